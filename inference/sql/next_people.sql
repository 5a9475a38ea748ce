-- The next people in order of their ids: all that have a history or a profile, and whether each is to be left out: asked to
-- be forgotten, or does not agree to be personalised.
SELECT p.user_id, EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = p.user_id)
    OR NOT coalesce((SELECT c.personalise FROM consents AS c WHERE c.user_id = p.user_id), %(unless_said)s::boolean) AS hidden
FROM (
    (SELECT DISTINCT user_id FROM user_history WHERE user_id > %(after)s ORDER BY user_id LIMIT %(most)s)
    UNION
    (SELECT user_id FROM people WHERE user_id > %(after)s ORDER BY user_id LIMIT %(most)s)
) AS p
ORDER BY p.user_id LIMIT %(most)s
