"""Brings a database to the roles and rights of schemas/roles.py, and gives the URLs that a serving process connects by.

Roles belong to the whole server, rights to one database; both may be there already, in part, or be somebody else's to
give. What is right already is not touched, so that a repeat writes nothing. Where the user who migrates may not make
roles, as on some managed servers, everything works with the rights of that user, and a warning says what to do.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg
from psycopg import sql

from schemas import catalogue_sql, functions, roles
from schemas.functions import Function
from schemas.roles import FUNCTION, ORCHESTRATOR, OWNER, ROLES, WRITER
from schemas.urls import shown, with_role, with_user

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

_ATTEMPTS = 5
_CONNECT_SECONDS = 5
_OURS = f"nspname IN ({', '.join(repr(name) for name in roles.SCHEMAS)})"
_NOT_OF_AN_EXTENSION = "NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = c.oid AND d.deptype = 'e')"


def ensure(connection: Connection) -> None:
    """Make roles, functions and rights as they are declared; part of every migration, in its transaction."""
    if not _may_alter(connection, "public.items"):
        return  # an orchestrator that found the schema up to date: rights are the owner's to give
    for function in functions.fixed():
        _ensure_function(connection, function)
    catalogue_sql.watch(connection, catalogue_sql.ITEMS)
    if not _ensure_roles(connection):
        return
    for schema in roles.SCHEMAS:
        for role, rights in ((OWNER, "CREATE"), (OWNER, "USAGE"), (ORCHESTRATOR, "CREATE"), (ORCHESTRATOR, "USAGE")):
            _ensure_schema_right(connection, schema, role, rights)
        _ensure_schema_right(connection, schema, FUNCTION, "USAGE")
    _ensure_schema_right(connection, "public", WRITER, "USAGE")
    _ensure_owners(connection)
    _ensure_reads(connection, roles.READS)
    _ensure_orchestrator_rights(connection)
    _ensure_executes(connection)


def ensure_view_rights(connection: Connection) -> None:
    """The same for what follows the declared views: their tables, and the function that keeps their tiles."""
    _ensure_function(connection, functions.accept_events())
    if missing_roles(connection):
        return
    _ensure_owners(connection)
    _ensure_reads(connection, roles.view_reads())
    if _may_alter(connection, "public.items"):
        _ensure_orchestrator_rights(connection)
    _ensure_executes(connection)


def missing_roles(connection: Connection) -> list[str]:
    """Which of the four roles this server lacks."""
    held = {
        name for (name,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", (list(ROLES),))
    }
    return [role for role in ROLES if role not in held]


def serving_urls(url: str) -> tuple[str, str]:
    """URLs that read as `larder_function` and write as `larder_writer`, in the database at `url`.

    The roles themselves where they get in without a password, as in the embedded server; else the user of `url` with
    the roles' rights; else, with a warning, `url` as it is.
    """
    found: list[str] = []
    for role in (FUNCTION, WRITER):
        for candidate in (with_user(url, role), with_role(url, role)):
            if _lets_in(candidate, role):
                found.append(candidate)
                break
    if len(found) == 2:
        return found[0], found[1]
    logger.warning(
        "%s serves with all the rights of its user: the roles %s and %s are not there or not its to take; see “Who may do "
        "what” in the README, then set DATABASE_URL and LARDER_WRITER_URL for the function itself",
        shown(url),
        FUNCTION,
        WRITER,
    )
    return url, url


def _lets_in(url: str, role: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS, autocommit=True) as connection:
            return connection.execute("SELECT current_user::text").fetchone() == (role,)
    except psycopg.Error:
        return False


# --- roles ---------------------------------------------------------------------------------------------------------


def _ensure_roles(connection: Connection) -> bool:
    """Whether all roles are there, made now if need be."""
    for role in missing_roles(connection):
        login = "LOGIN" if roles.LOGIN[role] else "NOLOGIN"
        statement = sql.SQL("CREATE ROLE {} {} NOSUPERUSER NOCREATEDB NOCREATEROLE").format(
            sql.Identifier(role), sql.SQL(login)
        )
        _try(connection, statement)
    missing = missing_roles(connection)
    if missing:
        wanted = "; ".join(f"CREATE ROLE {role} {'LOGIN' if roles.LOGIN[role] else 'NOLOGIN'}" for role in missing)
        logger.warning(
            "this server lacks the roles %s and the current user may not make them (it has no CREATEROLE), so requests run "
            "with the rights of the URL they are given; let an administrator run: %s; GRANT %s TO %s; "
            "GRANT %s TO <this user>; and migrate again",
            ", ".join(missing), wanted, ORCHESTRATOR, OWNER, OWNER,
        )  # fmt: skip
        return False
    # Who owns and migrates the rest may do what the orchestrator does.
    for role, member in ((ORCHESTRATOR, OWNER), (OWNER, "")):
        if not _is_member(connection, role, member):
            # To give tables away one must be able to take on the role that gets them.
            to = sql.Identifier(member) if member else sql.SQL("CURRENT_USER")
            _try(connection, sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), to))
    for role, settings in roles.SETTINGS.items():
        row = connection.execute("SELECT rolconfig FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
        held = (row and row[0]) or []
        for name, value in settings.items():
            if f"{name}={value}" not in held:
                statement = sql.SQL("ALTER ROLE {} SET {} = {}").format(
                    sql.Identifier(role), sql.Identifier(name), sql.Literal(value)
                )
                _try(connection, statement)
    return True


def _try(connection: Connection, statement: sql.Composed) -> bool:
    """Run a statement on what all databases of a server share; False if this user may not.

    Two databases that are migrated at once meet here, and no lock of ours spans databases: who comes second finds it done.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with connection.transaction():
                connection.execute(statement)
            return True
        except psycopg.errors.InsufficientPrivilege:
            return False
        except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
            return True
        except psycopg.errors.InternalError_:  # "tuple concurrently updated"
            if attempt == _ATTEMPTS - 1:
                raise
    return False


def _is_member(connection: Connection, role: str, member: str = "") -> bool:
    """Whether `member`, by default the current user, may act as `role`, and so give things to it."""
    # Since PostgreSQL 16 who makes a role is a member that may hand it on, and not yet one that may take it on.
    how = "SET" if connection.info.server_version >= 160_000 else "MEMBER"
    row = connection.execute(
        "SELECT pg_has_role(coalesce(nullif(%s, ''), current_user), %s, %s)", (member, role, how)
    ).fetchone()
    return bool(row and row[0])


def _may_alter(connection: Connection, table: str) -> bool:
    """Whether the current user owns `table`, or is a member of who does."""
    row = connection.execute(
        "SELECT pg_has_role(current_user, relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(%s)", (table,)
    ).fetchone()
    return bool(row and row[0])


# --- who owns what --------------------------------------------------------------------------------------------------


def _ensure_owners(connection: Connection) -> None:
    """Give every table, schema and function of ours to the role that should own it, where that may be done."""
    may = {role: _is_member(connection, role) for role in (OWNER, ORCHESTRATOR)}
    schemas = connection.execute(
        "SELECT nspname, pg_get_userbyid(nspowner), pg_has_role(current_user, nspowner, 'USAGE') FROM pg_namespace "
        "WHERE nspname IN ('features', 'online')"
    ).fetchall()
    for name, owner, own in schemas:
        if owner != ORCHESTRATOR and own and may[ORCHESTRATOR] and _may_create(connection):
            _alter(connection, sql.SQL("SCHEMA ") + sql.Identifier(name), ORCHESTRATOR)
    tables = connection.execute(
        f"SELECT nspname, relname, pg_get_userbyid(relowner), inhparent::regclass::text FROM pg_class AS c "
        f"JOIN pg_namespace AS n ON n.oid = relnamespace LEFT JOIN pg_inherits ON inhrelid = c.oid "
        f"WHERE relkind IN ('r', 'p') AND {_OURS} AND {_NOT_OF_AN_EXTENSION} "
        f"AND pg_has_role(current_user, relowner, 'USAGE')"
    ).fetchall()
    for schema, name, owner, parent in tables:
        of_data = schema != "public" or f"{schema}.{parent or name}" in roles.ORCHESTRATOR_OWNS
        wanted = ORCHESTRATOR if of_data else OWNER
        if owner != wanted and may[wanted]:
            _alter(connection, sql.SQL("TABLE ") + sql.Identifier(schema, name), wanted)
    calls = connection.execute(
        f"SELECT proname, c.oid::regprocedure::text, pg_get_userbyid(proowner) FROM pg_proc AS c "
        f"JOIN pg_namespace AS n ON n.oid = pronamespace WHERE {_OURS} AND prokind = 'f' AND {_NOT_OF_AN_EXTENSION} "
        f"AND pg_has_role(current_user, proowner, 'USAGE')"
    ).fetchall()
    for name, signature, owner in calls:
        wanted = ORCHESTRATOR if name == functions.accept_events().name else OWNER
        if owner != wanted and may[wanted]:
            _alter(connection, sql.SQL("FUNCTION " + signature), wanted)


def _may_create(connection: Connection) -> bool:
    row = connection.execute("SELECT has_database_privilege(current_database(), 'CREATE')").fetchone()
    return bool(row and row[0])


def _alter(connection: Connection, what: sql.Composable, owner: str) -> None:
    """Change an owner, which locks out readers for a moment; what is in use for longer is left to the next time."""
    try:
        with connection.transaction():
            connection.execute("SET LOCAL lock_timeout = '1s'")
            connection.execute(sql.SQL("ALTER {} OWNER TO {}").format(what, sql.Identifier(owner)))
            connection.execute("SET LOCAL lock_timeout = DEFAULT")
    except psycopg.errors.LockNotAvailable:
        logger.info("%s is in use and gets its owner %s with the next migration", what.as_string(connection), owner)


# --- rights ---------------------------------------------------------------------------------------------------------


def _ensure_reads(connection: Connection, reads: Mapping[str, tuple[str, ...]]) -> None:
    """Make `larder_function` read these columns of these tables, and the writer nothing; other tables stay as they are."""
    for table, columns in reads.items():
        if not _may_alter(connection, table):
            continue
        name = sql.Identifier(*table.split("."))
        wanted = {("SELECT", column) for column in columns} or {("SELECT", "")}
        if _held(connection, table, FUNCTION) != wanted:
            _revoke_all(connection, name, FUNCTION)
            listed = sql.SQL(", ").join(map(sql.Identifier, columns))
            rights = sql.SQL("SELECT ({})").format(listed) if columns else sql.SQL("SELECT")
            connection.execute(sql.SQL("GRANT {} ON {} TO {}").format(rights, name, sql.Identifier(FUNCTION)))
    for table in _tables(connection):
        for role in (FUNCTION, WRITER):
            declared = role == FUNCTION and (table in roles.READS or table in roles.view_reads())
            if not declared and _held(connection, table, role) and _may_alter(connection, table):
                _revoke_all(connection, sql.Identifier(*table.split(".")), role)


def _ensure_orchestrator_rights(connection: Connection) -> None:
    for table in _tables(connection):
        if not _may_alter(connection, table):
            continue
        wanted = roles.ORCHESTRATOR_RIGHTS.get(table, "SELECT, INSERT, UPDATE, DELETE")
        held = {right for right, column in _held(connection, table, ORCHESTRATOR) if not column}
        if _owner_is(connection, table, ORCHESTRATOR) or held == set(filter(None, wanted.split(", "))):
            continue
        name = sql.Identifier(*table.split("."))
        _revoke_all(connection, name, ORCHESTRATOR)
        if wanted:
            connection.execute(
                sql.SQL("GRANT {} ON {} TO {}").format(sql.SQL(wanted), name, sql.Identifier(ORCHESTRATOR))
            )


def _ensure_executes(connection: Connection) -> None:
    for function in (*functions.fixed(), functions.accept_events()):
        row = connection.execute(
            "SELECT pg_has_role(current_user, proowner, 'USAGE'), has_function_privilege(%s, oid, 'EXECUTE') FROM pg_proc "
            "WHERE oid = to_regprocedure(%s)",
            (roles.EXECUTES[function.name], function.signature),
        ).fetchone()
        if row == (True, False):
            role = sql.Identifier(roles.EXECUTES[function.name])
            connection.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(sql.SQL(function.signature), role))


def _ensure_function(connection: Connection, function: Function) -> None:
    """Make or replace a function, unless it stands as this text made it. At first nobody but its owner may call it."""
    made_by = hashlib.sha256(function.create.encode()).hexdigest()[:16]
    row = connection.execute("SELECT obj_description(to_regprocedure(%s), 'pg_proc')", (function.signature,)).fetchone()
    if row is not None and row[0] == made_by:
        return
    connection.execute(function.create.encode())
    connection.execute(f"REVOKE ALL ON FUNCTION {function.signature} FROM PUBLIC")
    connection.execute(f"COMMENT ON FUNCTION {function.signature} IS '{made_by}'")


def _tables(connection: Connection) -> list[str]:
    rows = connection.execute(
        f"SELECT nspname || '.' || relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace "
        f"WHERE relkind IN ('r', 'p', 'v', 'm') AND NOT relispartition AND {_OURS} AND {_NOT_OF_AN_EXTENSION} ORDER BY 1"
    )
    return [name for (name,) in rows]


def _held(connection: Connection, table: str, role: str) -> set[tuple[str, str]]:
    """What was granted to `role` on `table`: right and column, "" for the whole table."""
    rows: Iterable[tuple[str, str]] = connection.execute(
        "SELECT a.privilege_type, '' FROM pg_class AS c, aclexplode(c.relacl) AS a "
        "WHERE c.oid = to_regclass(%(table)s) AND a.grantee = to_regrole(%(role)s) UNION "
        "SELECT a.privilege_type, c.attname FROM pg_attribute AS c, aclexplode(c.attacl) AS a "
        "WHERE c.attrelid = to_regclass(%(table)s) AND a.grantee = to_regrole(%(role)s)",
        {"table": table, "role": role},
    )
    return set(rows)


def _owner_is(connection: Connection, table: str, role: str) -> bool:
    row = connection.execute(
        "SELECT relowner = to_regrole(%s) FROM pg_class WHERE oid = to_regclass(%s)", (role, table)
    ).fetchone()
    return bool(row and row[0])


def _revoke_all(connection: Connection, table: sql.Composable, role: str) -> None:
    connection.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(table, sql.Identifier(role)))


def _ensure_schema_right(connection: Connection, schema: str, role: str, right: str) -> None:
    """Grant on a schema, where that is this user's to give and not held yet."""
    row = connection.execute(
        "SELECT pg_has_role(current_user, nspowner, 'USAGE'), has_schema_privilege(%s, nspname, %s) FROM pg_namespace "
        "WHERE nspname = %s",
        (role, right, schema),
    ).fetchone()
    if row == (True, False):
        statement = sql.SQL("GRANT {} ON SCHEMA {} TO {}")
        connection.execute(statement.format(sql.SQL(right), sql.Identifier(schema), sql.Identifier(role)))
