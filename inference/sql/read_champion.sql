-- The version that serves, NULL while nothing has passed the gate; and the wish template that won, NULL while none has.
SELECT m.version, m.revision, m.path, (SELECT version FROM prompt_winners WHERE kind = 'wish') AS wish_template
FROM (SELECT 1) AS one LEFT JOIN (
    SELECT a.version, a.revision, v.path FROM model_aliases AS a JOIN model_versions AS v USING (version)
    WHERE a.alias = 'champion'
) AS m ON true
