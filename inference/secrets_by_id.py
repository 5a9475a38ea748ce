"""Secrets that follow one another, as settings hold them: `id:secret[,id:secret…]`, the first one signs, all are known."""

from __future__ import annotations

import re

from schemas.errors import SettingsError

MINIMUM_SECRET_BYTES = 32


def read_secrets(variable: str, text: str) -> dict[str, bytes]:
    """Secrets by id, in order. Raises SettingsError, which names `variable` and quotes no secret."""
    keys: dict[str, bytes] = {}
    for place, part in enumerate(text.split(","), start=1):
        key_id, found, secret = part.strip().partition(":")
        if not found or not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", key_id) or len(secret) < MINIMUM_SECRET_BYTES:
            raise SettingsError(
                f"{variable}, part {place}, is not id:secret with a secret of at least {MINIMUM_SECRET_BYTES} "
                "characters; make one with: python -c 'import secrets; print(\"a:\" + secrets.token_hex(32))'"
            )
        keys[key_id] = secret.encode()
    return keys
