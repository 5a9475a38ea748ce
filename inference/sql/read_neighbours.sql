-- What people went on to after each item, a row per item: hashes of the neighbours' ids, and scores as doubles.
SELECT item_id, string_agg(int8send(hashtextextended(neighbour_id, 0)), ''::bytea ORDER BY rank) AS neighbours,
    string_agg(float8send(score), ''::bytea ORDER BY rank) AS scores
FROM co_visitation GROUP BY item_id
