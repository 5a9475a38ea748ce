-- A row per candidate, with all that is known of it.
SELECT m.item_id, m.sources, m.evidence, i.title, i.categories, {vector} AS vector, {wish} AS wish,
    {groups} AS groups, {columns}
FROM merged AS m
JOIN items AS i ON i.item_id = m.item_id AND (i.available_at IS NULL OR i.available_at <= %(at)s)
{vector_join}
{wish_join}
{feature_joins}
ORDER BY m.place, m.item_id
