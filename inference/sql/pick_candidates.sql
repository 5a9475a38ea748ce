-- Candidates from every source, each item once, the best placed first. Placeholders in braces are filled by
-- inference/candidates.py: the conditions and sources that the request has, its limit, and how features are read.
--   sources: 1 user vector, 2 wish, 4 went on to, 8 trending, 16 fresh, 32 given by the caller
WITH allowed AS NOT MATERIALIZED (
    SELECT i.item_id FROM items AS i
    WHERE {allowed}
), picked AS (
    {sources}
), merged AS MATERIALIZED (
    SELECT item_id, bit_or(source)::int AS sources, min(place) AS place, max(evidence) AS evidence
    FROM picked GROUP BY item_id ORDER BY min(place), item_id LIMIT {limit}
), {features}
SELECT m.item_id, m.sources, m.evidence, i.title, i.categories, {vector} AS vector, {wish} AS wish,
    {groups} AS groups, {columns}
FROM merged AS m
JOIN items AS i ON i.item_id = m.item_id AND (i.available_at IS NULL OR i.available_at <= %(at)s)
{vector_join}
{wish_join}
{feature_joins}
ORDER BY m.place, m.item_id
