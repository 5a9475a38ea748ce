BEGIN
    -- With an argument the trigger shows which rows its statement wrote: one that wrote none changed nothing.
    IF TG_NARGS > 0 THEN
        IF NOT EXISTS (SELECT FROM changed) THEN
            RETURN NULL;
        END IF;
    END IF;
    -- Every request reads the log, so it stays short. Another transaction may be at the same old rows: it will have
    -- removed them.
    DELETE FROM catalogue_changes WHERE change_id IN (
        SELECT change_id FROM catalogue_changes WHERE changed_at < now() - INTERVAL '1 hour' FOR UPDATE SKIP LOCKED
    );
    INSERT INTO catalogue_changes DEFAULT VALUES;
    RETURN NULL;
END
