-- Keep answers to the two questions, one per person, list and question; a later one replaces it. Gives how many were kept:
-- none of who is forgotten, or asked to be. $1: a JSON array of answers.
DECLARE
    written integer;
BEGIN
    -- An erasure that is under way ends first, and its tombstone is seen by the next statement.
    PERFORM pg_advisory_xact_lock_shared({erasure_lock});
    INSERT INTO survey_answers (user_id, request_id, question, answer)
    SELECT DISTINCT ON (s.user_id, s.request_id, s.question) s.user_id, s.request_id, s.question, s.answer
    FROM jsonb_to_recordset($1) AS s (user_id text, request_id text, question text, answer smallint)
    WHERE NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = s.user_id)
    ORDER BY s.user_id, s.request_id, s.question
    ON CONFLICT (user_id, request_id, question) DO UPDATE SET answer = excluded.answer, answered_at = now();
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
