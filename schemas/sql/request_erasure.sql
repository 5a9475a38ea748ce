-- Ask for a person to be forgotten: from the commit on they read as unknown. Gives the request's id, which becomes that of
-- the receipt; asking again gives the same. NULL, with nothing written, if the database holds nothing of them.
-- $1: the person's id; $2: the id of a new request.
DECLARE
    found text;
BEGIN
    IF NOT EXISTS (SELECT FROM user_history WHERE user_id = $1) AND NOT EXISTS (SELECT FROM people WHERE user_id = $1)
        AND NOT EXISTS (SELECT FROM recent_events WHERE user_id = $1)
        AND NOT EXISTS (SELECT FROM served_features WHERE user_id = $1)
        AND NOT EXISTS (SELECT FROM served_requests WHERE user_id = $1)
        AND NOT EXISTS (SELECT FROM shadow_requests WHERE user_id = $1)
        AND NOT EXISTS (SELECT FROM quarantine WHERE strpos(file || ' ' || reason || ' ' || row, $1) > 0)
    THEN
        RETURN NULL;
    END IF;
    INSERT INTO erasure_requests (request_id, user_id) VALUES ($2, $1)
    ON CONFLICT (user_id) DO UPDATE SET user_id = excluded.user_id RETURNING request_id INTO found;
    RETURN found;
END
