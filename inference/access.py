"""Who may ask for what: request keys, looked up once in a while and compared in constant time, and their rate limits.

    ApiKeys    every request carries a key of table `api_keys` (LARDER_ACCESS=keys, the default)
    Platform   somebody in front has checked already: IAM, a gateway (LARDER_ACCESS=platform)

With LARDER_ACCESS=keys-over-http direct invocations, which IAM has checked, need no key.

Beside keys there are signed links (inference/links.py), each for one person and one purpose.
"""

from __future__ import annotations

import hmac
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import parse_qs

from inference.links import Links
from inference.settings import Settings
from inference.store import Store
from schemas.errors import Forbidden, TooManyRequests, Unauthorized, Unavailable
from schemas.keys import SCOPES, secret_hash, take_apart

RETRY_SECONDS = 5
"""How long after a look-up, the database being away, the next one is tried."""
REFRESH_MS = 250
"""How long a request with a key that is known waits for it to be looked up again, at most."""
UNKNOWN_SECONDS = 5
"""How long an id that is in no table is remembered as unknown."""
KEPT_KEYS = 10_000
LOOK_UPS_PER_MINUTE = 1_200
"""How many ids that are not in memory a process looks up: guessed keys must not keep the database busy."""
BURST_SECONDS = 10
"""So many seconds' worth of a key's requests may come at once."""


class Access(Protocol):
    """Decides whether a request is let in. Each method returns, or raises what is answered instead."""

    def check(self, headers: Mapping[str, str], scope: str | None, *, direct: bool = False) -> None:
        """Raises Unauthorized, Forbidden, TooManyRequests, or Unavailable while a key cannot be looked up.

        `scope` None: any good key will do. `direct`: the platform's own invocation, not HTTP.
        """

    def check_person(
        self,
        headers: Mapping[str, str],
        query: str,
        user_id: str,
        purpose: str,
        *,
        scope: str = "admin",
        direct: bool = False,
    ) -> None:
        """The same for what concerns one person: a key with `scope`, or a signed link (`token=` in the query) of them."""

    def close(self) -> None:
        """End what goes on beside the requests."""


class Platform:
    """Lets everything in: whoever can reach this process was checked by what stands in front of it."""

    def check(self, headers: Mapping[str, str], scope: str | None, *, direct: bool = False) -> None:
        return

    def check_person(
        self,
        headers: Mapping[str, str],
        query: str,
        user_id: str,
        purpose: str,
        *,
        scope: str = "admin",
        direct: bool = False,
    ) -> None:
        return

    def close(self) -> None:
        return


class TokenBucket:
    """So many requests a minute, some seconds' worth of them at once; safe between threads."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_minute / 60
        self._most = max(1.0, self._per_second * BURST_SECONDS)
        self._left, self._at, self._now = self._most, now(), now
        self._lock = threading.Lock()

    def take(self) -> float:
        """0 if a request may go ahead now, else in how many seconds one may."""
        with self._lock:
            now = self._now()
            self._left = min(self._most, self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1:
                return (1 - self._left) / self._per_second
            self._left -= 1
            return 0.0

    def put_back(self) -> None:
        """Give back one that was taken for nothing."""
        with self._lock:
            self._left = min(self._most, self._left + 1)


@dataclass(slots=True)
class _Known:
    """A key as it was looked up. Instants are of the monotonic clock."""

    row: tuple[bytes, frozenset[str], datetime | None, datetime | None] | None
    """Hash, scopes, when it expires, when it was revoked; None: there is no such key."""
    good_until: float
    refresh_at: float
    """When to look again, before it is no longer good."""
    per_minute: int = 1
    bucket: TokenBucket | None = None
    away: bool = False
    """Whether the database could not be asked the last time: then it stays good until it can."""


@dataclass(slots=True)
class ApiKeys:
    """Checks keys against `api_keys`, each looked up again within `cache_seconds`, so that a revocation counts by then.

    That is done beside the requests as long as these keep coming. A key that is known stays good while the database is
    away, until it expires; one that is not known is then neither let in nor refused: Unavailable.
    """

    store: Store
    cache_seconds: float = 60
    timeout_ms: int = 2_000
    links: Links | None = None
    trusts_direct: bool = False
    now: Callable[[], float] = time.monotonic
    _known: dict[str, _Known] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _look_ups: TokenBucket = field(init=False)
    _refreshing: set[threading.Thread] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._look_ups = TokenBucket(LOOK_UPS_PER_MINUTE, self.now)

    def check(self, headers: Mapping[str, str], scope: str | None, *, direct: bool = False) -> None:
        if direct and self.trusts_direct:
            return
        key_id, secret = _presented(headers.get("authorization"))
        known = self._look_up(key_id)
        # The same work for an id that is not there: how long it takes must not tell.
        expected = known.row[0] if known.row else b"\0" * 32
        if not hmac.compare_digest(secret_hash(secret), expected) or known.row is None or known.bucket is None:
            raise Unauthorized("this key is not known; look at the whole of it, or have one made with `make keys`")
        _, scopes, expires_at, revoked_at = known.row
        if revoked_at is not None:
            raise Unauthorized(f"key {key_id} was revoked on {revoked_at:%Y-%m-%d %H:%M} UTC; have a new one made")
        if expires_at is not None and expires_at <= datetime.now(UTC):
            raise Unauthorized(f"key {key_id} expired on {expires_at:%Y-%m-%d %H:%M} UTC; have a new one made")
        if scope is not None and not scopes & {scope, "admin"}:
            held = ", ".join(sorted(scopes))
            raise Forbidden(f"key {key_id} may {held}, and this needs {scope}; use a key that may {SCOPES[scope]}")
        wait_seconds = known.bucket.take()
        if wait_seconds:
            raise TooManyRequests(
                f"key {key_id} may ask {known.per_minute} times a minute; ask less often, or have its limit raised",
                retry_after_seconds=math.ceil(wait_seconds),
            )

    def check_person(
        self,
        headers: Mapping[str, str],
        query: str,
        user_id: str,
        purpose: str,
        *,
        scope: str = "admin",
        direct: bool = False,
    ) -> None:
        token = parse_qs(query).get("token", [])
        if token and "authorization" not in headers:
            if self.links is None:
                raise Unauthorized("signed links are not taken here: LARDER_LINK_KEYS is not set; use an admin key")
            self.links.verify(token[-1], user_id, purpose)
        else:
            self.check(headers, scope, direct=direct)

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Wait for look-ups that are under way."""
        for thread in list(self._refreshing):
            thread.join(timeout_seconds)

    def _look_up(self, key_id: str) -> _Known:
        """The key as last looked up. Raises Unavailable if it never was and cannot be now."""
        with self._lock:
            known, now = self._known.get(key_id), self.now()
            if known is not None and now < known.refresh_at:
                return known
            if known is None or known.row is None:
                if self._look_ups.take():
                    raise Unavailable("too many keys that are not known here are being looked up; try again")
            else:
                # Whoever else comes meanwhile goes by what is known.
                known.refresh_at = now + RETRY_SECONDS
        if known is None or known.row is None:
            try:
                return self._read(key_id, None, self.timeout_ms)
            except Unavailable:
                # Else those that come during an outage would keep the first ones after it waiting for their turn.
                self._look_ups.put_back()
                raise Unavailable("this key cannot be checked while the database is away; try again") from None
        if known.away or now < known.good_until:
            thread = threading.Thread(target=self._refresh_beside, args=(key_id, known), name="larder-key", daemon=True)
            self._refreshing.add(thread)
            thread.start()
            return known
        return self._refresh(key_id, known)

    def _refresh_beside(self, key_id: str, known: _Known) -> None:
        try:
            self._refresh(key_id, known, self.timeout_ms)
        finally:
            self._refreshing.discard(threading.current_thread())

    def _refresh(self, key_id: str, known: _Known, timeout_ms: int = REFRESH_MS) -> _Known:
        try:
            return self._read(key_id, known, timeout_ms)
        except Unavailable:
            known.away = True
            return known

    def _read(self, key_id: str, before: _Known | None, timeout_ms: int) -> _Known:
        sql = "SELECT secret_hash, scopes, per_minute, expires_at, revoked_at FROM api_key(%s)"
        rows = self.store.rows(sql, [key_id], timeout_ms)
        now = self.now()
        if rows:
            kept, scopes, per_minute, expires_at, revoked_at = rows[0]
            # Looking again gives nobody new requests.
            same = before is not None and before.per_minute == per_minute
            bucket = before.bucket if before is not None and same else TokenBucket(per_minute, self.now)
            key = (bytes(kept), frozenset(scopes), expires_at, revoked_at)
            good_until, refresh_at = now + self.cache_seconds, now + self.cache_seconds / 2
            found = _Known(key, good_until, refresh_at, per_minute, bucket)
        else:
            found = _Known(None, now + UNKNOWN_SECONDS, now + UNKNOWN_SECONDS)
        with self._lock:
            self._known.pop(key_id, None)  # what is looked up last stays longest
            self._known[key_id] = found
            while len(self._known) > KEPT_KEYS:
                del self._known[next(iter(self._known))]
        return found


def access_of(settings: Settings, store: Store) -> Access:
    """Who checks requests, as the settings say; keys are read from `store`."""
    if settings.access == "platform":
        return Platform()
    return ApiKeys(
        store,
        settings.key_cache_seconds,
        settings.timeout_ms,
        Links.read(settings.link_keys) if settings.link_keys else None,
        settings.access == "keys-over-http",
    )


def _presented(authorization: str | None) -> tuple[str, str]:
    """Id and secret of the key that came in a header."""
    if not authorization:
        raise Unauthorized("there is no key; send 'authorization: Bearer <key>' (`make keys` makes one)")
    kind, _, key = authorization.partition(" ")
    parts = take_apart(key.strip())
    if kind.lower() != "bearer" or parts is None:
        raise Unauthorized(
            "authorization holds no key of ours; send 'authorization: Bearer larder_…', one key and no more"
        )
    return parts
