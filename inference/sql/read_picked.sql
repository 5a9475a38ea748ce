-- One row, for who has the items in memory (inference/item_cache.py): the candidates and the days that their partitions do
-- not know, each column as one value: texts with a zero between, numbers in binary.
SELECT p.item_ids, p.sources, p.places, p.evidence, p.wish, {also} AS also, d.owners, d.long, d.tiles, {edges}
FROM edge CROSS JOIN (
    SELECT string_agg(textsend(m.item_id), '\x00'::bytea ORDER BY m.place, m.item_id) AS item_ids,
        string_agg(int4send(m.sources), ''::bytea ORDER BY m.place, m.item_id) AS sources,
        string_agg(int4send(m.place::int), ''::bytea ORDER BY m.place, m.item_id) AS places,
        string_agg(float8send(m.evidence), ''::bytea ORDER BY m.place, m.item_id) AS evidence,
        {wish} AS wish
    FROM merged AS m {wish_join}
) AS p CROSS JOIN (
    SELECT string_agg(textsend(item_id), '\x00'::bytea) AS owners, string_agg(int4send(octet_length(tiles)), ''::bytea) AS long,
        string_agg(tiles, ''::bytea) AS tiles
    FROM t
) AS d
