-- Keep each of these people's newest events only.
DELETE FROM user_history AS h USING (
    SELECT user_id, occurred_at, event_id,
        row_number() OVER (PARTITION BY user_id ORDER BY occurred_at DESC, event_id DESC) AS place
    FROM user_history WHERE user_id = ANY(%(user_ids)s)
) AS ranked
WHERE ranked.place > %(keep)s
    AND (h.user_id, h.occurred_at, h.event_id) = (ranked.user_id, ranked.occurred_at, ranked.event_id)
