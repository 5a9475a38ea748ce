-- Keep feature vectors as they were served, one row per read and view (see inference/served.py), of nobody who is
-- forgotten or has refused to be personalised; drop old ones. Gives how many were new. $1: a JSON array of rows.
DECLARE
    written integer;
BEGIN
    -- An erasure that is under way ends first, and its tombstone is seen by the next statement.
    PERFORM pg_advisory_xact_lock_shared({erasure_lock});
    INSERT INTO served_features (read_id, view, request_id, user_id, read_at, seen, definition_hash, partition_date,
        built_at, built_seen, built_by, features, keys, numbers)
    SELECT s.read_id, s.view, s.request_id, s.user_id, s.read_at, s.seen, s.definition_hash, s.partition_date,
        l.built_at, l.seen, l.xmin::text::bigint, s.features, s.keys, s.numbers
    FROM jsonb_to_recordset($1) AS s (
        read_id text, view text, request_id text, user_id text, read_at timestamptz, seen text, definition_hash text,
        partition_date date, features text[], keys text[], numbers real[]
    )
    LEFT JOIN feature_ledger AS l ON l.view = s.view AND l.partition_date = s.partition_date
    LEFT JOIN tombstones AS t ON t.user_hash = user_hash(s.user_id) AND s.read_at <= t.forgotten_at
    WHERE t.user_hash IS NULL AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = s.user_id)
        AND NOT EXISTS (SELECT FROM consents AS c WHERE c.user_id = s.user_id AND NOT c.personalise)
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS written = ROW_COUNT;
    DELETE FROM served_features WHERE read_at < now() - INTERVAL '{kept_days} days';
    RETURN written;
END
