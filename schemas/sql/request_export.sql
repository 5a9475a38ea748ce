-- Ask for all that is held of a person, and give at once what lies here under their id, by table: their own rows as they
-- are. What was computed from those, the lake and the training sets come with the export that Dagster makes. Asking again
-- while one waits gives the same receipt; one that was made is made anew. NULL, with nothing written, if nothing is held.
-- $1: the person's id; $2: the id of a new request.
DECLARE
    place record;
    rows jsonb;
    held jsonb := '{}';
    receipt text;
BEGIN
    FOR place IN
        SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'user_id' AND NOT a.attisdropped
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = 'public'
            AND c.oid <> 'public.exports'::regclass AND has_table_privilege(c.oid, 'SELECT')
        ORDER BY c.relname
    LOOP
        EXECUTE format('SELECT jsonb_agg(to_jsonb(t)) FROM %I.%I AS t WHERE t.user_id = $1', place.nspname, place.relname)
            INTO rows USING $1;
        IF rows IS NOT NULL THEN
            held := held || jsonb_build_object(place.nspname || '.' || place.relname, rows);
        END IF;
    END LOOP;
    -- Only that they asked, to be forgotten or for this, is nothing to export.
    IF held - 'public.erasure_requests' = '{}' THEN
        RETURN NULL;
    END IF;
    INSERT INTO exports AS e (request_id, user_id) VALUES ($2, $1)
    ON CONFLICT (user_id) DO UPDATE SET
        request_id = CASE WHEN e.ready_at IS NULL THEN e.request_id ELSE excluded.request_id END,
        requested_at = CASE WHEN e.ready_at IS NULL THEN e.requested_at ELSE excluded.requested_at END,
        document = NULL, ready_at = NULL
    RETURNING e.request_id INTO receipt;
    RETURN jsonb_build_object('receipt_id', receipt, 'held', held);
END
