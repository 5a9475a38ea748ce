"""What a person is called in the request log: an HMAC under a key that changes, so that a line names nobody.

    <key's id>:<HMAC-SHA256 of the person's id, the first 128 bits in hex>

The keys are those of LARDER_LOG_KEYS, see inference/secrets_by_id.py: the first one names, the others are known so that older
lines can still be found. A key that is thrown away makes nobody's of all its lines.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from inference.secrets_by_id import read_secrets

VARIABLE = "LARDER_LOG_KEYS"
_HEX_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Names people under the secrets of `keys`, by id; the first one is used for new lines."""

    keys: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def read(cls, text: str) -> Pseudonyms | None:
        """From the setting; None where it is empty. Raises SettingsError, which quotes no secret."""
        return cls(read_secrets(VARIABLE, text)) if text else None

    def of(self, user_id: str) -> str:
        """What `user_id` is called in a line that is written now."""
        return self.all_of(user_id)[0]

    def all_of(self, user_id: str) -> tuple[str, ...]:
        """What they are called under each key, the newest first: what their lines are searched for."""
        # Apart from other uses of a secret, should somebody use one twice.
        message = b"larder-log\0" + user_id.encode("utf-8", "surrogatepass")
        return tuple(
            f"{key_id}:{hmac.digest(secret, message, 'sha256').hex()[:_HEX_DIGITS]}"
            for key_id, secret in self.keys.items()
        )
