-- A person's newest events with titles, newest first; none of who asked to be forgotten.
SELECT h.item_id, i.title, h.kind, h.value, h.occurred_at FROM user_history AS h LEFT JOIN items AS i USING (item_id)
WHERE h.user_id = %(user_id)s AND NOT EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = %(user_id)s)
ORDER BY h.occurred_at DESC, h.event_id DESC LIMIT %(limit)s
