-- How far an erasure is: whether its request waits and is this person's, and the receipt of one that was done.
SELECT q.request_id IS NOT NULL AS waits, r.forgotten_at, r.removed, r.finished_at
FROM (SELECT 1) AS one
LEFT JOIN erasure_requests AS q ON q.request_id = %(receipt_id)s AND q.user_id = %(user_id)s
LEFT JOIN erasure_receipts AS r ON r.receipt_id = %(receipt_id)s
