-- One request key by its id, for whoever has to compare it; nobody gets the list. $1: the key's id.
BEGIN
    RETURN QUERY SELECT k.secret_hash, k.scopes, k.per_minute, k.expires_at, k.revoked_at FROM api_keys AS k
    WHERE k.key_id = $1;
END
