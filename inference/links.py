"""Signed links: what lets one person, without a key, do one thing about themselves until a certain time.

    v1.<signing key's id>.<expiry, seconds since 1970>.<HMAC-SHA256, base64url>

The signature covers the person and the purpose, which the token itself does not name. It is made by whoever knows the
secret of LARDER_LINK_KEYS, `id:secret[,id:secret…]`: the first one signs, all of them verify, so that one can follow
another.
"""

from __future__ import annotations

import base64
import hmac
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from inference.secrets_by_id import read_secrets
from schemas.errors import SettingsError, Unauthorized

PURPOSES = ("consent", "export", "forget")
MAX_DAYS = 90

_TOKEN = re.compile(r"v1\.([A-Za-z0-9_-]{1,32})\.(\d{1,12})\.([A-Za-z0-9_-]{43})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Links:
    """Makes and verifies tokens under the secrets of `keys`, by id; the first one signs."""

    keys: Mapping[str, bytes] = field(repr=False)
    now: Callable[[], float] = time.time

    @classmethod
    def read(cls, text: str) -> Links:
        """From `id:secret[,id:secret…]`. Raises SettingsError, which quotes no secret."""
        return cls(read_secrets("LARDER_LINK_KEYS", text))

    def make(self, user_id: str, purpose: str, days: float) -> str:
        """A token that lets whoever holds it do `purpose` about `user_id` for so many days."""
        if purpose not in PURPOSES or not 0 < days <= MAX_DAYS:
            raise SettingsError(
                f"a link is for {' or '.join(PURPOSES)} and at most {MAX_DAYS} days, not {purpose!r}, {days}"
            )
        key_id = next(iter(self.keys))
        expires = int(self.now() + days * 86_400)
        return f"v1.{key_id}.{expires}.{_signature(self.keys[key_id], user_id, purpose, expires)}"

    def verify(self, token: str, user_id: str, purpose: str) -> None:
        """Raises Unauthorized unless the token is for this person and purpose, and still good."""
        found = _TOKEN.fullmatch(token)
        secret = self.keys.get(found[1]) if found else None
        if found is None or secret is None:
            raise Unauthorized("token is no signed link of ours; ask for a new one")
        expires = int(found[2])
        # The signature first: of a token that nobody signed not even its expiry is worth a word.
        if not hmac.compare_digest(_signature(secret, user_id, purpose, expires).encode(), found[3].encode()):
            raise Unauthorized("this link was signed for another person or purpose; ask for a new one")
        if expires <= self.now():
            raise Unauthorized("this link has expired; ask for a new one")


def _signature(secret: bytes, user_id: str, purpose: str, expires: int) -> str:
    # Ids hold no zero byte, so that no two of these read the same.
    message = "\0".join(("larder-link", "v1", purpose, str(expires), user_id))
    return base64.urlsafe_b64encode(hmac.digest(secret, message.encode("utf-8", "surrogatepass"), "sha256")).decode()[
        :43
    ]
