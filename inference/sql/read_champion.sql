-- The version that serves; no row while nothing has passed the gate.
SELECT a.version, a.revision, m.path FROM model_aliases AS a JOIN model_versions AS m USING (version)
WHERE a.alias = 'champion'
