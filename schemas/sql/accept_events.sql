-- Store events once each: key, recent event, history and tiles. Gives the ids that were new. $1: a JSON array of events.
-- An event from before its person was forgotten counts as a repeat, so that the sender learns nothing of it.
BEGIN
    -- An erasure that is under way ends first, and its tombstone is seen by the next statement.
    LOCK TABLE event_keys IN ROW EXCLUSIVE MODE;
    RETURN QUERY WITH incoming AS (
        SELECT e.* FROM jsonb_to_recordset($1) AS e (
            event_id text, user_id text, item_id text, kind text, value float8, occurred_at timestamptz, request_id text
        )
        LEFT JOIN tombstones AS t ON t.user_hash = user_hash(e.user_id) AND e.occurred_at <= t.forgotten_at
        WHERE t.user_hash IS NULL
    ), fresh AS (
        -- In order of the key, so that two writers of the same events cannot block each other.
        INSERT INTO event_keys (event_id, occurred_at)
        SELECT DISTINCT ON (event_id) event_id, occurred_at FROM incoming ORDER BY event_id
        ON CONFLICT DO NOTHING RETURNING event_id
    ), stored AS (
        INSERT INTO recent_events (event_id, occurred_at, user_id, item_id, kind, value, request_id)
        SELECT DISTINCT ON (event_id) event_id, occurred_at, user_id, item_id, kind, value, request_id
        FROM incoming JOIN fresh USING (event_id) ORDER BY event_id
        RETURNING event_id, occurred_at, user_id, item_id, kind, value, known_at
    ), history AS (
        INSERT INTO user_history (user_id, occurred_at, event_id, item_id, kind, value)
        SELECT user_id, occurred_at, event_id, item_id, kind, value FROM stored ON CONFLICT DO NOTHING
    ), {tiles}
    SELECT event_id FROM stored;
    -- Keep each of these people's newest events only.
    DELETE FROM user_history AS h USING (
        SELECT user_id, occurred_at, event_id,
            row_number() OVER (PARTITION BY user_id ORDER BY occurred_at DESC, event_id DESC) AS place
        FROM user_history
        WHERE user_id = ANY(ARRAY(SELECT DISTINCT e.user_id FROM jsonb_to_recordset($1) AS e (user_id text)))
    ) AS ranked
    WHERE ranked.place > {history}
        AND (h.user_id, h.occurred_at, h.event_id) = (ranked.user_id, ranked.occurred_at, ranked.event_id);
END
