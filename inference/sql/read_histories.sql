-- The events of many people before an instant, a row each, oldest first: items and kinds as texts with a zero between, and
-- of each event its instant in seconds and its value (NaN: none) as doubles. A row per event would cost more to take apart.
SELECT h.user_id, string_agg(textsend(h.item_id), '\x00'::bytea ORDER BY h.occurred_at, h.event_id) AS item_ids,
    string_agg(textsend(h.kind), '\x00'::bytea ORDER BY h.occurred_at, h.event_id) AS kinds,
    string_agg(float8send(date_part('epoch', h.occurred_at)) || float8send(coalesce(h.value, 'NaN')), ''::bytea
        ORDER BY h.occurred_at, h.event_id) AS numbers
FROM user_history AS h WHERE h.user_id = ANY(%(users)s::text[]) AND h.occurred_at < %(at)s
GROUP BY h.user_id
