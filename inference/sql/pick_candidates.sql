-- Candidates from every source, each item once, the best placed first. Placeholders in braces are filled by
-- inference/candidates.py: the conditions and sources that the request has, its limit, how features are read, and what
-- is given of them: read_candidates.sql or read_picked.sql.
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
{given}
