-- The version that serves, and a person's newest events before an instant, newest first, with a version's item vectors.
-- One statement and so one snapshot: a release between the two would else give one version's vectors to another's model.
SELECT m.version, m.revision, m.path, (SELECT version FROM prompt_winners WHERE kind = 'wish') AS wish_template,
    coalesce(%(model)s::text, m.version) AS vectors_of,
    -- Only who agrees is personalised; of all others nothing is read here, nor by the statements beside this one.
    coalesce((SELECT c.personalise FROM consents AS c WHERE c.user_id = %(user_id)s), %(unless_said)s::boolean) AS personalise,
    -- Whether the items that a process keeps in memory are still what the tables say: schemas/catalogue_sql.py.
    {catalogue} AS catalogue,
    h.item_id, h.kind, h.value, EXTRACT(EPOCH FROM h.occurred_at)::float8 AS occurred_at, v.vector, i.title
FROM (SELECT 1) AS one
LEFT JOIN (
    SELECT a.version, a.revision, v.path FROM model_aliases AS a JOIN model_versions AS v USING (version)
    WHERE a.alias = 'champion'
) AS m ON true
LEFT JOIN (
    SELECT item_id, kind, value, occurred_at, event_id FROM user_history
    WHERE user_id = %(user_id)s AND occurred_at < %(at)s
        -- Who asked to be forgotten reads as unknown from that moment on.
        AND NOT EXISTS (SELECT FROM erasure_requests AS r WHERE r.user_id = %(user_id)s)
        AND coalesce((SELECT c.personalise FROM consents AS c WHERE c.user_id = %(user_id)s), %(unless_said)s::boolean)
    ORDER BY occurred_at DESC, event_id DESC LIMIT %(limit)s
) AS h ON true
LEFT JOIN items AS i ON i.item_id = h.item_id
LEFT JOIN item_vectors AS v ON v.item_id = h.item_id
    AND v.model_version = coalesce(%(model)s::text, (SELECT version FROM model_aliases WHERE alias = 'champion'))
ORDER BY h.occurred_at DESC, h.event_id DESC
