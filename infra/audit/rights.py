"""Who may do what, as the database has it at this moment: roles, their grants, functions, request keys without secrets."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import psycopg

from inference import routes
from infra import keys
from schemas.keys import SCOPES
from schemas.roles import ROLES, SCHEMAS

Connection = psycopg.Connection[Any]


def text(connection: Connection) -> str:
    """The page. What the current user may not see is named, not left out."""
    parts = [
        "# Who may do what",
        "Read from the database, not from a plan: what stands here is what is granted now. The declaration that migrations "
        "follow is `schemas/roles.py`.",
        "## SQL roles",
        *_roles(connection),
        "## Grants on tables",
        *_grants(connection),
        "## Functions that run with their owner's rights",
        *_functions(connection),
        "## Requests",
        "A key has scopes; `admin` may do everything. A signed link stands for one person and one purpose.",
        *_routes(),
        "## Request keys",
        *_keys(connection),
    ]
    return "\n\n".join(parts) + "\n"


def grants(connection: Connection) -> dict[str, dict[str, str]]:
    """By role and table, partitions left out: rights, with their columns where they do not cover the table."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    rows = connection.execute(
        "WITH t AS (SELECT c.oid, c.relacl, c.relowner, n.nspname || '.' || c.relname AS name FROM pg_class AS c "
        "JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm') AND NOT c.relispartition "
        "AND n.nspname = ANY(%(schemas)s)), granted AS ("
        "SELECT t.name, coalesce(r.rolname, 'PUBLIC') AS role, a.privilege_type AS privilege, NULL AS columns FROM t "
        "CROSS JOIN aclexplode(coalesce(t.relacl, acldefault('r', t.relowner))) AS a LEFT JOIN pg_roles AS r ON r.oid = a.grantee "
        "UNION ALL SELECT t.name, coalesce(r.rolname, 'PUBLIC'), a.privilege_type, "
        "string_agg(c.attname, ', ' ORDER BY c.attnum) FROM t JOIN pg_attribute AS c ON c.attrelid = t.oid AND c.attnum > 0 "
        "CROSS JOIN aclexplode(c.attacl) AS a LEFT JOIN pg_roles AS r ON r.oid = a.grantee GROUP BY 1, 2, 3) "
        "SELECT role, name, privilege, columns FROM granted ORDER BY role, name, privilege",
        {"schemas": list(SCHEMAS)},
    ).fetchall()
    for role, table, right, columns in rows:
        found[role][table].append(f"{right} ({columns})" if columns else right)
    return {role: {table: ", ".join(rights) for table, rights in held.items()} for role, held in found.items()}


def _roles(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT r.rolname, r.rolcanlogin, r.rolsuper, r.rolcreaterole, r.rolconfig, (SELECT string_agg(m.rolname, ', ' "
        "ORDER BY m.rolname) FROM pg_auth_members AS a JOIN pg_roles AS m ON m.oid = a.member WHERE a.roleid = r.oid) "
        "FROM pg_roles AS r WHERE r.rolname = ANY(%s) OR r.rolsuper ORDER BY r.rolname",
        (list(ROLES),),
    ).fetchall()
    lines = ["| role | may log in | superuser | may make roles | settings | members |", "| --- " * 6 + "|"]
    for name, login, superuser, creates, config, members in rows:
        said = ["yes" if value else "no" for value in (login, superuser, creates)]
        lines.append(f"| {name} | {' | '.join(said)} | {'; '.join(config or []) or '–'} | {members or '–'} |")
    missing = sorted(set(ROLES) - {row[0] for row in rows})
    warnings = [
        f"**{role} is not there**: whoever should be limited to it works with the rights of its own user."
        for role in missing
    ]
    return ["\n".join(lines), *warnings]


def _grants(connection: Connection) -> list[str]:
    parts: list[str] = []
    for role, held in sorted(grants(connection).items()):
        lines = [f"### {role}", "", "| table | rights |", "| --- | --- |"]
        lines += [f"| `{table}` | {rights} |" for table, rights in sorted(held.items())]
        parts.append("\n".join(lines))
    return parts or ["Nothing is granted to anybody."]


def _functions(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT p.oid::regprocedure::text, pg_get_userbyid(p.proowner), (SELECT string_agg(coalesce(r.rolname, 'PUBLIC'), ', ' "
        "ORDER BY r.rolname) FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a "
        "LEFT JOIN pg_roles AS r ON r.oid = a.grantee WHERE a.grantee <> p.proowner) FROM pg_proc AS p "
        "JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE p.prosecdef AND n.nspname = ANY(%s) ORDER BY 1",
        (list(SCHEMAS),),
    ).fetchall()
    lines = ["| function | owner | who may call it |", "| --- | --- | --- |"]
    return ["\n".join([*lines, *(f"| `{name}` | {owner} | {who or 'nobody else'} |" for name, owner, who in rows)])]


def _routes() -> list[str]:
    lines = ["| route | scope | or a signed link for |", "| --- | --- | --- |"]
    for route, (method, _) in routes.ROUTES.items():
        lines.append(
            f"| {method} {route} | {routes.SCOPES[route] or 'open to all'} | {routes.LINKED.get(route, '–')} |"
        )
    scopes = "\n".join(f"- `{scope}`: may {what}" for scope, what in SCOPES.items())
    return [scopes, "\n".join(lines)]


def _keys(connection: Connection) -> list[str]:
    if connection.execute("SELECT has_table_privilege('api_keys', 'SELECT')").fetchone() != (True,):
        return [f"**Not shown**: {keys.MAY_NOT}."]
    rows = connection.execute(
        "SELECT key_id, name, scopes, per_minute, created_at, expires_at, revoked_at FROM api_keys ORDER BY created_at"
    ).fetchall()
    lines = ["| id | for | scopes | a minute | made | state |", "| --- " * 6 + "|"]
    for key_id, name, scopes, per_minute, created_at, expires_at, revoked_at in rows:
        state = keys.state(expires_at, revoked_at)
        lines.append(
            f"| {key_id} | {str(name).replace('|', '/')} | {', '.join(scopes)} | {per_minute:,} | {created_at:%Y-%m-%d} | {state} |"
        )
    return ["\n".join(lines)] if rows else ["There are none."]
