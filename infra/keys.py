"""`make keys`: request keys of the current deployment, made (and shown once), listed, revoked; links for one person, and their pseudonyms.

Only a hash of a key is kept. A running function takes note of a revocation within LARDER_KEY_CACHE_SECONDS.
"""

from __future__ import annotations

import argparse
import hmac
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from inference.links import PURPOSES, Links
from inference.pseudonyms import VARIABLE, Pseudonyms
from infra import deployment as deployments
from infra import postgres
from infra.arguments import MakeParser, person_id
from schemas.errors import LarderError, SettingsError
from schemas.keys import DEFAULT_PER_MINUTE, MAX_PER_MINUTE, SCOPES, make_key, secret_hash, take_apart
from schemas.roles import OWNER

DEVELOPMENT = "development key of make serve"
DEVELOPMENT_FILE = "development.key"
MAY_NOT = (
    f"the user of DATABASE_URL may not see or make keys; take one that is a member of {OWNER}, or made the database"
)
_DEVELOPMENT_DAYS = 30

Connection = psycopg.Connection[Any]


def create(
    connection: Connection,
    name: str,
    scopes: Sequence[str],
    *,
    per_minute: int = DEFAULT_PER_MINUTE,
    expires_at: datetime | None = None,
) -> str:
    """A new key, which nobody can be shown again. Raises SettingsError for what a key cannot have."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise SettingsError(f"scopes {', '.join(unknown) or 'are missing'}; give some of {', '.join(SCOPES)}")
    if not 1 <= per_minute <= MAX_PER_MINUTE:
        raise SettingsError(f"per minute is {per_minute}; give a whole number from 1 to {MAX_PER_MINUTE}")
    if not name.strip():
        raise SettingsError("a key without a name cannot be told from another; say what it is for")
    key_id, key, kept = make_key()
    connection.execute(
        "INSERT INTO api_keys (key_id, name, secret_hash, scopes, per_minute, expires_at) VALUES (%s, %s, %s, %s, %s, %s)",
        (key_id, name.strip(), kept, sorted(set(scopes)), per_minute, expires_at),
    )
    return key


def revoke(connection: Connection, key_id: str) -> datetime:
    """When key `key_id` was revoked: now, or before. Raises SettingsError if there is no such key."""
    # Somebody who revokes in a hurry may paste the whole key.
    parts = take_apart(key_id)
    row = connection.execute(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = %s RETURNING revoked_at",
        (parts[0] if parts else key_id,),
    ).fetchone()
    if row is None:
        raise SettingsError("there is no key of that id; `make keys` lists them")
    revoked_at: datetime = row[0]
    return revoked_at


def development_key(connection: Connection, folder: Path) -> str:
    """The key that `make serve` shows: that of the last time, kept in `folder`, while it is good, else a new one."""
    file = folder / DEVELOPMENT_FILE
    kept = file.read_text().strip() if file.exists() else ""
    parts = take_apart(kept)
    if parts is not None:
        row = connection.execute(
            "SELECT secret_hash FROM api_keys WHERE key_id = %s AND revoked_at IS NULL AND expires_at > now()",
            (parts[0],),
        ).fetchone()
        if row is not None and hmac.compare_digest(bytes(row[0]), secret_hash(parts[1])):
            return kept
    expires_at = datetime.now(UTC) + timedelta(days=_DEVELOPMENT_DAYS)
    key = create(connection, DEVELOPMENT, list(SCOPES), per_minute=MAX_PER_MINUTE, expires_at=expires_at)
    connection.commit()
    folder.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(key + "\n")
    return key


def listed(connection: Connection) -> list[str]:
    """One line per key, the newest first; without what would let anybody in."""
    rows = connection.execute(
        "SELECT key_id, name, scopes, per_minute, created_at, expires_at, revoked_at FROM api_keys ORDER BY created_at DESC"
    ).fetchall()
    return [
        f"{key_id}  {state(expires_at, revoked_at):<18}  {','.join(scopes):<21}  {per_minute:>9,}/min  "
        f"made {created_at:%Y-%m-%d}  {name}"
        for key_id, name, scopes, per_minute, created_at, expires_at, revoked_at in rows
    ]


def state(expires_at: datetime | None, revoked_at: datetime | None) -> str:
    """What became of a key, in words."""
    if revoked_at is not None:
        return f"revoked {revoked_at:%Y-%m-%d}"
    if expires_at is None:
        return "good"
    return f"{'expired' if expires_at <= datetime.now(UTC) else 'until'} {expires_at:%Y-%m-%d}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = MakeParser(prog="python -m infra.keys", description="Request keys of the current deployment.")
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser(
        "create",
        command="make keys NAME=… [SCOPES=recommend,write] [PER_MINUTE=6000] [DAYS=…]",
        help="make a key; it is shown once",
    )
    making.add_argument("--name", required=True, help="who or what it is for")
    making.add_argument(
        "--scopes", default="recommend,write", help=f"some of {', '.join(SCOPES)} (default: %(default)s)"
    )
    making.add_argument(
        "--per-minute", type=int, default=DEFAULT_PER_MINUTE, help="requests a minute (default: %(default)s)"
    )
    making.add_argument("--days", type=float, help="good for so long (default: until it is revoked)")
    actions.add_parser("list", help="all keys, without what would let anybody in")
    revoking = actions.add_parser("revoke", help="take a key back")
    revoking.add_argument("key_id", help="the part of the key between the underscores")
    naming = actions.add_parser("pseudonyms", help="what a person is called in the request log; needs LARDER_LOG_KEYS")
    naming.add_argument("--user", required=True, metavar="ID", help="the person; - reads the id from standard input")
    linking = actions.add_parser("link", help="a signed link, for one person and one purpose; needs LARDER_LINK_KEYS")
    linking.add_argument("--user", required=True, metavar="ID", help="the person; - reads the id from standard input")
    linking.add_argument("--purpose", choices=PURPOSES, default="forget")
    linking.add_argument("--days", type=float, default=7, help="good for so long (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.action == "link":
            print(_link(options.user, options.purpose, options.days))
            return 0
        if options.action == "pseudonyms":
            print("\n".join(_pseudonyms(options.user)))
            return 0
        record = deployments.current()
        if deployments.load(record.name) is None:
            raise SettingsError(
                f"there is no deployment in {deployments.home()} to have keys for: run `make run` first"
            )
        with psycopg.connect(postgres.prepare(record), options="-c TimeZone=UTC") as connection:
            _act(connection, options)
    except LarderError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    except psycopg.errors.InsufficientPrivilege:
        print(f"error (settings): {MAY_NOT}", file=sys.stderr)
        return 1
    return 0


def _act(connection: Connection, options: argparse.Namespace) -> None:
    if options.action == "list":
        print("\n".join(listed(connection)) or "no keys yet; `make keys NAME=…` makes one")
    elif options.action == "revoke":
        print(f"revoked on {revoke(connection, options.key_id):%Y-%m-%d %H:%M} UTC")
    else:
        if options.days is not None and not 0 < options.days <= 36_500:
            raise SettingsError(f"days is {options.days}; give more than 0, or leave it out for a key without an end")
        expires_at = None if options.days is None else datetime.now(UTC) + timedelta(days=options.days)
        scopes = [scope.strip() for scope in options.scopes.split(",") if scope.strip()]
        print(create(connection, options.name, scopes, per_minute=options.per_minute, expires_at=expires_at))
        print("this is the only time it is shown; send it as 'authorization: Bearer <key>'", file=sys.stderr)


def _link(user: str, purpose: str, days: float) -> str:
    secrets = os.environ.get("LARDER_LINK_KEYS")
    if not secrets:
        raise SettingsError("LARDER_LINK_KEYS is not set; give the value that the function has")
    user_id = person_id(user, "--user")
    return f"/people/{quote(user_id, safe='')}/{purpose}?token={Links.read(secrets).make(user_id, purpose, days)}"


def _pseudonyms(user: str) -> tuple[str, ...]:
    """One for each key, the newest first."""
    known = Pseudonyms.read(os.environ.get(VARIABLE, ""))
    if known is None:
        raise SettingsError(
            f"{VARIABLE} is not set; give the value that the function has, with the keys that it had before"
        )
    return known.all_of(person_id(user, "--user"))


if __name__ == "__main__":
    sys.exit(main())
