-- What people went on to after each item, a row per item: neighbours as texts with a zero between, scores as doubles.
SELECT item_id, string_agg(textsend(neighbour_id), '\x00'::bytea ORDER BY rank) AS neighbours,
    string_agg(float8send(score), ''::bytea ORDER BY rank) AS scores
FROM co_visitation GROUP BY item_id
