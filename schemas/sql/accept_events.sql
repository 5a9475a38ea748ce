-- Store events once each: key, recent event, history and tiles. Gives the ids that were new. $1: a JSON array of events.
-- An event from before its person was forgotten counts as a repeat, so that the sender learns nothing of it.
-- Nothing is kept of what people do who are not personalised (without_consent tells whose events those were).
BEGIN
    -- An erasure that is under way ends first, and its tombstone is seen by the next statement.
    LOCK TABLE event_keys IN ROW EXCLUSIVE MODE;
    RETURN QUERY WITH incoming AS (
        SELECT e.* FROM jsonb_to_recordset($1) AS e (
            event_id text, user_id text, item_id text, kind text, value float8, occurred_at timestamptz, request_id text,
            unless_said boolean
        )
        LEFT JOIN tombstones AS t ON t.user_hash = user_hash(e.user_id) AND e.occurred_at <= t.forgotten_at
        LEFT JOIN consents AS c ON c.user_id = e.user_id
        -- `unless_said` is what holds for who has said nothing of being personalised; a sender of before knows only yes.
        WHERE t.user_hash IS NULL AND coalesce(c.personalise, e.unless_said, true)
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
    -- By their places: joined by their keys, nearly none of them, they would cost a look at the whole table.
    DELETE FROM user_history WHERE ctid = ANY(ARRAY(
        SELECT old.place FROM (SELECT DISTINCT e.user_id FROM jsonb_to_recordset($1) AS e (user_id text)) AS person
        CROSS JOIN LATERAL (
            SELECT h.ctid AS place FROM user_history AS h WHERE h.user_id = person.user_id
            ORDER BY h.occurred_at DESC, h.event_id DESC OFFSET {history}
        ) AS old
    ));
END
