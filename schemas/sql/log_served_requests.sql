-- Keep what was shown, one row per answered request, and what shadows would have shown (inference/served_request.py), of
-- nobody who is forgotten; drop old rows. What is there already stays as it is. Gives how many rows were new.
-- $1: a JSON array of rows; one with a `shadow` is a shadow's.
DECLARE
    written integer;
    beside integer;
BEGIN
    -- An erasure that is under way ends first, and its tombstone is seen by the next statement.
    PERFORM pg_advisory_xact_lock_shared({erasure_lock});
    WITH incoming AS MATERIALIZED (
        SELECT s.* FROM jsonb_to_recordset($1) AS s (
            request_id text, shadow boolean, user_id text, served_at timestamptz, wish_digest text, experiment text, arm text,
            arm_share real, model_version text, prompt_version text, item_ids text[], scores real[], propensities real[],
            candidate_ids text[], candidate_scores real[], candidates integer, sources jsonb, degraded text[]
        )
        LEFT JOIN tombstones AS t ON t.user_hash = user_hash(s.user_id) AND s.served_at <= t.forgotten_at
        WHERE t.user_hash IS NULL AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = s.user_id)
    ), served AS (
        INSERT INTO served_requests (request_id, user_id, served_at, wish_hash, experiment, arm, arm_share, model_version,
            prompt_version, item_ids, scores, propensities, candidate_ids, candidate_scores, candidates, sources, degraded)
        -- In order of the key, so that two writers of the same requests cannot block each other.
        -- The text of a wish does not come here: its digest does, and the key never leaves the database.
        SELECT request_id, user_id, served_at, encode(user_hash('wish:' || wish_digest), 'hex'), experiment, arm, arm_share,
            model_version, prompt_version, item_ids, scores, propensities, candidate_ids, candidate_scores, candidates,
            sources, degraded
        FROM incoming WHERE NOT shadow ORDER BY request_id
        ON CONFLICT DO NOTHING RETURNING 1
    ), shadows AS (
        INSERT INTO shadow_requests (request_id, arm, experiment, user_id, served_at, model_version, prompt_version, item_ids,
            scores, candidates, sources, degraded)
        SELECT request_id, arm, experiment, user_id, served_at, model_version, prompt_version, item_ids, scores, candidates,
            sources, degraded
        FROM incoming WHERE shadow ORDER BY request_id, arm
        ON CONFLICT DO NOTHING RETURNING 1
    )
    SELECT (SELECT count(*) FROM served), (SELECT count(*) FROM shadows) INTO written, beside;
    -- A part at a time, and none that another writer is about to drop.
    DELETE FROM served_requests WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM served_requests WHERE served_at < now() - INTERVAL '{kept_days} days' LIMIT 1000
        FOR UPDATE SKIP LOCKED
    ));
    DELETE FROM shadow_requests WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM shadow_requests WHERE served_at < now() - INTERVAL '{kept_days} days' LIMIT 1000
        FOR UPDATE SKIP LOCKED
    ));
    RETURN written + beside;
END
