-- The next items after one, in the order of their ids, each column as one value: texts with a zero between, numbers in
-- binary. `vectors` and `{{view}}` hold those that are there, in order; `has_vector` and `has_{{view}}` say which.
-- Placeholders in braces are filled by inference/item_cache.py.
SELECT count(*)::int AS n, max(item_id) AS last,
    string_agg(textsend(item_id), '\x00'::bytea ORDER BY item_id) AS item_ids,
    string_agg(textsend(title), '\x00'::bytea ORDER BY item_id) AS titles,
    string_agg(textsend(array_to_json(categories)::text), '\x00'::bytea ORDER BY item_id) AS categories,
    string_agg(float8send(coalesce(date_part('epoch', available_at)::float8, '-Infinity')), ''::bytea ORDER BY item_id)
        AS available_at,
    string_agg(boolsend(vector IS NOT NULL), ''::bytea ORDER BY item_id) AS has_vector,
    string_agg(halfvec_send(vector), ''::bytea ORDER BY item_id) AS vectors{columns}
FROM (
    SELECT i.item_id, i.title, i.categories, i.available_at, v.vector::halfvec({dim}) AS vector{read}
    FROM items AS i
    LEFT JOIN item_vectors AS v ON v.item_id = i.item_id AND v.model_version = %(version)s
    LEFT JOIN {rows} AS r ON r.item_id = i.item_id
    WHERE i.item_id > %(after)s
    ORDER BY i.item_id LIMIT %(limit)s
) AS next
