-- The first few people who have a history, in order of their ids: one step of the index for each, however many there are.
WITH RECURSIVE person AS (
    (SELECT user_id, 1 AS place FROM user_history ORDER BY user_id LIMIT 1)
    UNION ALL
    SELECT (SELECT h.user_id FROM user_history AS h WHERE h.user_id > p.user_id ORDER BY h.user_id LIMIT 1), p.place + 1
    FROM person AS p WHERE p.user_id IS NOT NULL AND p.place < %(limit)s
)
SELECT user_id FROM person WHERE user_id IS NOT NULL
AND NOT EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = person.user_id) ORDER BY user_id
