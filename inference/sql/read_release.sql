-- Whether a model version may answer: where its files are, whether it passed its gate, and of how many items it knows vectors.
SELECT v.path,
    EXISTS (SELECT FROM gate_records AS g WHERE g.version = v.version AND g.passed) AS passed,
    (SELECT count(*) FROM text_vectors) AS items,
    (SELECT count(*) FROM text_vectors AS t WHERE NOT EXISTS (
        SELECT FROM item_vectors AS i WHERE i.model_version = v.version AND i.item_id = t.item_id
    )) AS missing
FROM (SELECT 1) AS one JOIN model_versions AS v ON v.version = %(version)s
