-- Items shown to a person since an instant, by other requests than this one, that nothing came of since they were first shown.
SELECT s.item_id
FROM (
    SELECT shown.item_id, min(r.served_at) AS first_at
    FROM served_requests AS r CROSS JOIN LATERAL unnest(r.item_ids) AS shown (item_id)
    WHERE r.user_id = %(user_id)s AND r.served_at >= %(held_since)s AND r.served_at < %(at)s
        AND r.request_id IS DISTINCT FROM %(request_id)s::text
        AND NOT EXISTS (SELECT FROM erasure_requests AS q WHERE q.user_id = %(user_id)s)
    GROUP BY shown.item_id
) AS s
WHERE NOT EXISTS (
    SELECT FROM user_history AS h
    WHERE h.user_id = %(user_id)s AND h.item_id = s.item_id AND h.occurred_at >= s.first_at AND h.occurred_at < %(at)s
)
