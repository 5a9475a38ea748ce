-- Each person's newest events before an instant, newest first, with the champion's item vectors where there is one.
SELECT h.item_id, h.kind, h.value, EXTRACT(EPOCH FROM h.occurred_at)::float8 AS occurred_at, v.vector, i.title
FROM (
    SELECT item_id, kind, value, occurred_at, event_id FROM user_history
    WHERE user_id = %(user_id)s AND occurred_at < %(at)s
        -- Who asked to be forgotten reads as unknown from that moment on.
        AND NOT EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = %(user_id)s)
    ORDER BY occurred_at DESC, event_id DESC LIMIT %(limit)s
) AS h
LEFT JOIN items AS i ON i.item_id = h.item_id
LEFT JOIN item_vectors AS v
    ON v.item_id = h.item_id AND v.model_version = (SELECT version FROM model_aliases WHERE alias = 'champion')
ORDER BY h.occurred_at DESC, h.event_id DESC
