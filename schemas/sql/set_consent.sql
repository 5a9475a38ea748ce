-- Keep what a person has said to being personalised, the last word only. Gives since when it holds. $1: the person's id;
-- $2: their answer. Saying the same again changes nothing.
DECLARE
    since timestamptz;
BEGIN
    INSERT INTO consents AS c (user_id, personalise) VALUES ($1, $2)
    ON CONFLICT (user_id) DO UPDATE SET personalise = excluded.personalise,
        decided_at = CASE WHEN c.personalise = excluded.personalise THEN c.decided_at ELSE excluded.decided_at END
    RETURNING c.decided_at INTO since;
    RETURN since;
END
