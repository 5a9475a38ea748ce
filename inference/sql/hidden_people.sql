-- Of these people, who was forgotten since the instant at which they were read, asked to be, or does not agree to be
-- personalised.
SELECT u.user_id FROM unnest(%(users)s::text[]) AS u (user_id)
WHERE EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = u.user_id)
    OR NOT coalesce((SELECT c.personalise FROM consents AS c WHERE c.user_id = u.user_id), %(unless_said)s::boolean)
    OR CASE WHEN EXISTS (SELECT FROM tombstones)
        THEN EXISTS (SELECT FROM tombstones AS t WHERE t.user_hash = user_hash(u.user_id) AND t.forgotten_at >= %(at)s) END
