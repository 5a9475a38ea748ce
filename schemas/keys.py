"""What a request key looks like: how one is made, taken apart and hashed. Who may do what with it is in inference/access.py.

    larder_<key id, 12 hex digits>_<secret, 64 hex digits>

The id finds the row, the secret proves it. Stored is SHA-256 of the secret: 256 random bits cannot be guessed from it,
so that a slow hash, made for passwords that people choose, would only slow down every request.
"""

from __future__ import annotations

import hashlib
import re
import secrets

SCOPES: dict[str, str] = {
    "recommend": "ask for recommendations and neighbours",
    "write": "post events",
    "admin": "all of it, and forget people",
}
"""What a key may be for."""
DEFAULT_PER_MINUTE = 6_000
MAX_PER_MINUTE = 1_000_000

_KEY = re.compile(r"larder_([0-9a-f]{12})_([0-9a-f]{64})", re.ASCII)


def make_key() -> tuple[str, str, bytes]:
    """A new key: its id, the whole of it to hand out once, and the hash to keep."""
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    return key_id, f"larder_{key_id}_{secret}", secret_hash(secret)


def take_apart(key: str) -> tuple[str, str] | None:
    """Id and secret of a key; None for what does not look like one."""
    found = _KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


def secret_hash(secret: str) -> bytes:
    """What is kept of a secret, 32 bytes."""
    return hashlib.sha256(secret.encode()).digest()
