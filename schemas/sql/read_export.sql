-- The export of a person that was asked for, `document` NULL until Dagster has made it; no row if there is none.
-- $1: the person's id; $2: the request's.
BEGIN
    RETURN QUERY SELECT e.document, e.ready_at FROM exports AS e WHERE e.user_id = $1 AND e.request_id = $2;
END
