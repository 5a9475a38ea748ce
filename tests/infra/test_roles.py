"""The four roles: what each may do, what it may not, and servers where nobody may make them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import psycopg
import pytest
from conftest import TODAY, days_ago, replace_database
from worlds import ListSource, serving

from inference.candidates import Filters
from inference.features import read_features
from inference.runtime import LarderApplication
from inference.settings import Settings
from inference.store import Store
from infra import postgres, registry, roles
from infra.feature_tables import ensure_view_tables
from orchestration.compute.forget import fulfil, read_receipt, request_erasure
from orchestration.compute.ingest import ingest
from orchestration.compute.lake import Lake
from orchestration.compute.materialise import materialise
from orchestration.compute.recent import roll_partitions
from schemas import functions
from schemas.errors import DatabaseError, Unavailable
from schemas.events import Event, Item
from schemas.manifest import Manifest
from schemas.roles import EXECUTES, FUNCTION, ORCHESTRATOR, OWNER, READS, ROLES, WRITER, view_reads
from schemas.serving import EventsRequest, PostedEvent, RecommendationRequest
from schemas.urls import with_role, with_user
from schemas.views import ITEM_ACTIVITY, USER_AFFINITY, VIEWS

Denied = psycopg.errors.InsufficientPrivilege


def as_role(url: str, role: str) -> psycopg.Connection[Any]:
    """A connection as a person with that role's rights has it, free of what the role sets for its sessions."""
    connection = psycopg.connect(with_user(url, role), autocommit=True)
    connection.execute("SET default_transaction_read_only = off")
    connection.execute("SET statement_timeout = '20s'")
    return connection


def tables(connection: psycopg.Connection[Any]) -> list[str]:
    rows = connection.execute(
        "SELECT nspname || '.' || relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace "
        "WHERE relkind IN ('r', 'p') AND nspname IN ('public', 'features', 'online') AND NOT relispartition ORDER BY 1"
    ).fetchall()
    return [name for (name,) in rows]


def columns(connection: psycopg.Connection[Any], table: str) -> list[str]:
    rows = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
        (table,),
    ).fetchall()
    return [name for (name,) in rows]


# --- the function ---------------------------------------------------------------------------------------------------


def test_the_function_reads_every_kind_of_request(database: str) -> None:
    store, at = Store(with_user(database, FUNCTION)), datetime.now(UTC)
    text, vector = np.ones(384, np.float32), np.ones(64, np.float32)
    try:
        assert store.ping(5_000) is None
        for live in (True, False):
            person = store.read_person("u", at, 5_000, live=live, audited=live)
            assert person.history.item_ids == []
            for more in ({"given": ["i"]}, {"champion": "m", "dim": 64, "user_vector": vector, "wish_text": text}):
                store.pick_candidates(
                    at=at, filters=Filters(["x"], ["a"], ["b"]), limit=50, timeout_ms=5_000, recent=["i"], live=live,
                    audited=live, **more,
                )  # fmt: skip
        for anchor in ({"item_id": "i", "text": None}, {"item_id": None, "text": text}):
            store.similar(at=at, k=3, filters=Filters(), timeout_ms=5_000, **anchor)
        for instant in (None, at):
            read_features(store, {ITEM_ACTIVITY: [("i",)], USER_AFFINITY: [("u", "a")]}, at=instant)
    finally:
        store.close()


def test_the_function_reads_nothing_that_a_request_does_not_need(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    allowed = READS | view_reads()
    every = tables(connection)
    assert set(allowed) <= set(every)
    with as_role(database, FUNCTION) as function:
        for table in every:
            for column in columns(connection, table):
                sql = f"SELECT {column} FROM {table} LIMIT 1"
                if table in allowed and (not allowed[table] or column in allowed[table]):
                    function.execute(sql)
                else:
                    with pytest.raises(Denied, match="permission denied"):
                        function.execute(sql)
    for table in ("quarantine", "api_keys", "people", "erasure_key", "tombstones", "lake_files"):
        assert f"public.{table}" not in allowed


def test_the_function_writes_nothing_and_sees_no_password(database: str, connection: psycopg.Connection[Any]) -> None:
    with as_role(database, FUNCTION) as function:
        for table in tables(connection):
            column = columns(connection, table)[0]
            for sql in (
                f"INSERT INTO {table} DEFAULT VALUES",
                f"UPDATE {table} SET {column} = DEFAULT",
                f"DELETE FROM {table}",
                f"TRUNCATE {table}",
            ):
                with pytest.raises(Denied):
                    function.execute(sql)
        for sql in (
            "SELECT rolpassword FROM pg_authid",
            "SELECT passwd FROM pg_shadow",
            "CREATE TABLE mine (a int)",
            "CREATE TABLE online.mine (a int)",
            "CREATE ROLE friend",
            f"SET ROLE {OWNER}",
            f"SET ROLE {WRITER}",
            "SELECT pg_read_file('postgresql.conf')",
            "COPY items TO PROGRAM 'true'",
            "SELECT accept_events('[]'::jsonb)",
            "SELECT request_erasure('u', 'r')",
        ):
            with pytest.raises(Denied):
                function.execute(sql)


def test_sessions_of_the_function_are_read_only_and_end_long_statements(database: str) -> None:
    with psycopg.connect(with_user(database, FUNCTION), autocommit=True) as function:
        assert function.execute("SHOW statement_timeout").fetchone() == ("5s",)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            function.execute("CREATE TABLE mine (a int)")


# --- the writer -----------------------------------------------------------------------------------------------------


def test_the_writer_calls_its_functions_and_nothing_else(database: str, connection: psycopg.Connection[Any]) -> None:
    with as_role(database, WRITER) as writer:
        for table in tables(connection):
            column = columns(connection, table)[0]
            for sql in (
                f"SELECT {column} FROM {table}",
                f"INSERT INTO {table} DEFAULT VALUES",
                f"UPDATE {table} SET {column} = DEFAULT",
                f"DELETE FROM {table}",
            ):
                with pytest.raises(Denied):
                    writer.execute(sql)
        for sql in (
            "SELECT * FROM api_key('a')",
            "CREATE TABLE mine (a int)",
            f"SET ROLE {OWNER}",
            "SELECT user_hash('u')",
        ):
            with pytest.raises(Denied):
                writer.execute(sql)
        assert writer.execute("SELECT * FROM accept_events('[]')").fetchall() == []
        assert writer.execute("SELECT log_served('[]')").fetchone() == (0,)
        assert writer.execute("SELECT request_erasure('nobody', 'r')").fetchone() == (None,)


def test_what_runs_with_its_owners_rights_is_listed_and_nobody_else_may_call_it(
    connection: psycopg.Connection[Any],
) -> None:
    rows = connection.execute(
        "SELECT p.proname, pg_get_userbyid(p.proowner), rolsuper, ARRAY(SELECT grantee::regrole::text FROM "
        "aclexplode(proacl) WHERE grantee <> proowner) FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = pronamespace "
        "JOIN pg_roles AS r ON r.oid = proowner WHERE prosecdef AND nspname IN ('public', 'features', 'online')"
    ).fetchall()
    assert {name: callers for name, _, _, callers in rows} == {name: [role] for name, role in EXECUTES.items()}
    assert not any(is_superuser for _, _, is_superuser, _ in rows)


def test_a_table_of_the_callers_own_does_not_take_the_place_of_ours(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    event = '[{"event_id":"e","user_id":"u","item_id":"i","kind":"view","occurred_at":"2026-01-01T00:00:00Z"}]'
    with as_role(database, WRITER) as writer:
        writer.execute("CREATE TEMP TABLE event_keys (event_id text, occurred_at timestamptz)")
        writer.execute("SET search_path = pg_temp, public")
        assert writer.execute("SELECT * FROM public.accept_events(%s)", [event]).fetchall() == [("e",)]
        assert writer.execute("SELECT count(*) FROM pg_temp.event_keys").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM public.event_keys").fetchone() == (1,)


def test_serving_writes_by_the_writer_and_reads_by_the_function(
    database: str, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    application = LarderApplication.from_settings(serving(database, tmp_path.as_uri()))
    try:
        event = PostedEvent(event_id="e", user_id="u", item_id="i", kind="view")
        application.accept_events(EventsRequest(events=(event,)))
        application.recommend(RecommendationRequest(user_id="u"))
        assert application.flush(10_000)
        users = connection.execute(
            "SELECT usename, query FROM pg_stat_activity WHERE application_name = 'larder' AND datname = current_database()"
        ).fetchall()
        assert {user for user, _ in users} == {FUNCTION, WRITER}
        written = [query for user, query in users if user == WRITER]
        assert [sum(name in query for query in written) for name in ("accept_events", "log_served_requests")] == [1, 1]
        assert len(written) == 2
    finally:
        application.close()


# --- the orchestrator -----------------------------------------------------------------------------------------------


def test_the_orchestrator_does_a_days_work(database: str, tmp_path: Path) -> None:
    url, lake = with_user(database, ORCHESTRATOR), Lake((tmp_path / "lake").as_uri())
    postgres.migrate(url)  # up to date: found so, and left alone
    ensure_view_tables(url)
    events = [
        Event(f"{u}{n}", u, f"i{n % 2}", "rating", float(n), days_ago(n)) for u in ("u", "v") for n in range(1, 6)
    ]
    items = [Item("i0", "I", categories=("a", "b")), Item("i1", "J", categories=("a",))]
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        ingest(ListSource(events, list(items)), lake, connection, now=TODAY)
        roll_partitions(connection, lake, datetime.now(UTC))
        made = Manifest(
            "ranker", "small", 64, "f", (), (), "e", "item.v1", "wish.v1", "2026-01-01T00:00:00+00:00", 1, {}
        )
        registry.register(connection, made, "models/ranker/1")
        registry.record_gate(connection, made.version, True, {})
        connection.execute(f"CREATE TABLE item_vectors_x PARTITION OF item_vectors FOR VALUES IN ('{made.version}')")
        registry.promote(connection, made.version)
    for view in VIEWS:
        materialise(view, days_ago(1).date(), days_ago(1).date(), url=url, lake=lake)
    request = request_erasure(url, lake, "u")
    fulfil(request, url=url, lake=lake, artifacts_url=tmp_path.as_uri())
    receipt = read_receipt(url, request)
    assert receipt is not None
    assert receipt.finished


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM api_keys",
        "UPDATE model_versions SET path = 'x'",
        "DELETE FROM gate_records",
        "ALTER TABLE model_aliases DISABLE TRIGGER ALL",
        "DROP TABLE items",
        f"SET ROLE {OWNER}",
        "SELECT rolpassword FROM pg_authid",
    ],
)
def test_the_orchestrator_changes_no_record_of_what_was_judged_and_no_guard(database: str, sql: str) -> None:
    with as_role(database, ORCHESTRATOR) as orchestrator, pytest.raises(Denied):
        orchestrator.execute(sql)


def test_a_store_whose_role_lacks_a_right_says_so(database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute(f"REVOKE ALL ON popular_items FROM {FUNCTION}")
    connection.commit()
    store = Store(with_user(database, FUNCTION))
    with pytest.raises(Unavailable, match=r"permission denied for table popular_items.*gives each role its rights"):
        store.pick_candidates(at=TODAY, filters=Filters(), limit=5, timeout_ms=5_000)
    store.close()


def test_an_orchestrator_that_meets_an_older_schema_says_who_may_migrate(postgres_url: str, template: str) -> None:
    name = f"{template}_empty"
    with psycopg.connect(postgres_url, autocommit=True) as administrator:
        administrator.execute(f"CREATE DATABASE {name}")
    url = replace_database(postgres_url, name)
    with psycopg.connect(url, autocommit=True) as administrator:
        administrator.execute("CREATE EXTENSION vector")
    with pytest.raises(DatabaseError, match=r"may not migrate it \(permission denied .*let a member of larder_owner"):
        postgres.migrate(with_user(url, ORCHESTRATOR))
    with psycopg.connect(postgres_url, autocommit=True) as administrator:
        administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_everything_is_owned_by_whom_it_should_be(connection: psycopg.Connection[Any]) -> None:
    owners = connection.execute(
        "SELECT nspname || '.' || relname, pg_get_userbyid(relowner) FROM pg_class AS c JOIN pg_namespace AS n "
        "ON n.oid = relnamespace WHERE relkind IN ('r', 'p') AND nspname IN ('public', 'features', 'online')"
    ).fetchall()
    of_data = {name for name, owner in owners if owner == ORCHESTRATOR}
    assert {owner for _, owner in owners} == {OWNER, ORCHESTRATOR}
    assert {name for name in of_data if name.startswith("public.")} == {
        "public.recent_events", "public.recent_events_default", "public.item_vectors",
    }  # fmt: skip
    assert of_data >= set(view_reads())


# --- servers where they are not there yet ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a server on which nothing was migrated yet, so that it has no roles."""
    return postgres.start_embedded(tmp_path_factory.mktemp("bare") / "data")


@pytest.fixture
def bare(bare_server: str) -> Iterator[str]:
    yield bare_server
    with psycopg.connect(bare_server, autocommit=True) as connection:
        names = [name for (name,) in connection.execute("SELECT datname FROM pg_database WHERE datname ~ '^larder'")]
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        for role in (*ROLES, "plain", "maker"):
            if connection.execute("SELECT to_regrole(%s)", (role,)).fetchone() != (None,):
                connection.execute(f"DROP OWNED BY {role} CASCADE")
                connection.execute(f"DROP ROLE {role}")


def make_database(server: str, name: str, owner: str, attributes: str = "") -> str:
    """A database of `owner`, a login role with those `attributes`; its URL for that role."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {owner} LOGIN {attributes}")
        connection.execute(f"CREATE DATABASE {name} OWNER {owner}")
    with psycopg.connect(replace_database(server, name), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    return with_user(replace_database(server, name), owner)


def test_who_may_not_make_roles_is_told_what_to_do_and_can_go_on(bare: str, caplog: pytest.LogCaptureFixture) -> None:
    url = make_database(bare, "larder_plain", "plain")
    with caplog.at_level(logging.WARNING):
        postgres.migrate(url)
        ensure_view_tables(url)
    assert "CREATE ROLE larder_function LOGIN" in caplog.text
    assert "has no CREATEROLE" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert roles.serving_urls(url) == (url, url)
    assert "serves with all the rights of its user" in caplog.text
    store = Store(url)
    posted = {"event_id": "e", "user_id": "u", "item_id": "i", "kind": "view", "occurred_at": TODAY.isoformat()}
    assert store.accept_events([posted], 5_000) == {"e"}
    store.close()
    # The administrator does what the warning says.
    with psycopg.connect(bare, autocommit=True) as administrator:
        for role in ROLES:
            administrator.execute(f"CREATE ROLE {role} {'NOLOGIN' if role == OWNER else 'LOGIN'}")
        administrator.execute(f"GRANT {ORCHESTRATOR} TO {OWNER}")
        administrator.execute(f"GRANT {OWNER} TO plain")
    postgres.migrate(url)
    ensure_view_tables(url)
    reader, writer = roles.serving_urls(url)
    assert (reader, writer) == (with_user(url, FUNCTION), with_user(url, WRITER))
    with psycopg.connect(reader) as connection:
        assert connection.execute("SELECT user_id FROM user_history").fetchall() == [("u",)]
    with psycopg.connect(reader) as connection, pytest.raises(Denied):
        connection.execute("SELECT * FROM people")


def test_an_owner_who_may_make_roles_need_not_be_a_superuser(bare: str) -> None:
    url = make_database(bare, "larder_maker", "maker", "CREATEROLE")
    postgres.migrate(url)
    ensure_view_tables(url)
    with psycopg.connect(url) as connection:
        test_everything_is_owned_by_whom_it_should_be(connection)
        settings = connection.execute("SELECT rolconfig FROM pg_roles WHERE rolname = %s", (FUNCTION,)).fetchone()
    assert settings is not None
    assert "default_transaction_read_only=on" in settings[0]
    store = Store(with_user(url, FUNCTION))
    assert store.read_person("u", datetime.now(UTC), 5_000, live=True).champion is None
    store.close()


def test_where_the_roles_need_a_password_the_user_takes_them_on(bare: str, tmp_path: Path) -> None:
    """As with a `DATABASE_URL` of one's own: the session has the roles' rights, whoever it belongs to."""
    folder = Path(dict(parse_qsl(urlsplit(bare).query))["host"])
    rules = (folder / "pg_hba.conf").read_text()
    with psycopg.connect(bare, autocommit=True) as connection:
        connection.execute("CREATE DATABASE larder_asks")
    url = replace_database(bare, "larder_asks")
    postgres.migrate(url)
    ensure_view_tables(url)
    try:
        (folder / "pg_hba.conf").write_text(f"local all {FUNCTION},{WRITER} scram-sha-256\n{rules}")
        with psycopg.connect(bare, autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")
            while roles._lets_in(with_user(url, FUNCTION), FUNCTION):
                pass
        reader, writer = roles.serving_urls(url)
        assert (reader, writer) == (with_role(url, FUNCTION), with_role(url, WRITER))
        application = LarderApplication.from_settings(Settings(reader, tmp_path.as_uri(), writer_url=writer))
        event = PostedEvent(event_id="e", user_id="u", item_id="i", kind="view")
        (outcome,) = application.accept_events(EventsRequest(events=(event,))).outcomes
        assert outcome.outcome == "stored"
        assert application.store.read_person("u", datetime.now(UTC), 5_000, live=True).history.item_ids == ["i"]
        with pytest.raises(Unavailable, match="permission denied"):
            application.store.rows("SELECT user_id FROM people", [], 5_000)
        application.close()
    finally:
        (folder / "pg_hba.conf").write_text(rules)
        with psycopg.connect(bare, autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")


def test_databases_of_one_server_may_be_migrated_at_once(bare: str) -> None:
    names = [f"larder_at_once_{number}" for number in range(3)]
    with psycopg.connect(bare, autocommit=True) as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name}")
    code = "import sys; from infra.postgres import migrate; from infra.feature_tables import ensure_view_tables as ensure; "
    code += "[(migrate(url), ensure(url)) for url in sys.argv[1:]]"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, replace_database(bare, name)], stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in processes] == [("", 0)] * 3
    for name in names:
        with psycopg.connect(with_user(replace_database(bare, name), FUNCTION)) as connection:
            assert connection.execute("SELECT item_id FROM items").fetchall() == []


def test_a_repeat_writes_nothing_and_a_right_too_many_is_taken_back(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    def written() -> list[Any]:
        rows = connection.execute(
            "SELECT oid::text, xmin::text FROM pg_class WHERE relnamespace IN ('public'::regnamespace, 'features'::regnamespace, "
            "'online'::regnamespace) UNION ALL SELECT oid::text, xmin::text FROM pg_proc WHERE prosecdef "
            "UNION ALL SELECT oid::text, xmin::text FROM pg_namespace ORDER BY 1"
        ).fetchall()
        connection.commit()
        return rows

    before = written()
    postgres.migrate(database)
    ensure_view_tables(database)
    assert written() == before
    connection.execute(f"GRANT SELECT ON people, items TO {FUNCTION}")
    connection.execute(f"GRANT INSERT ON recent_events TO {WRITER}")
    connection.commit()
    postgres.migrate(database)
    with as_role(database, FUNCTION) as function:
        for sql in ("SELECT profile FROM people", "SELECT description FROM items"):
            with pytest.raises(Denied):
                function.execute(sql)
        function.execute("SELECT title FROM items")
    with as_role(database, WRITER) as writer, pytest.raises(Denied):
        writer.execute("INSERT INTO recent_events DEFAULT VALUES")


def test_a_function_whose_text_changed_is_made_anew(database: str, connection: psycopg.Connection[Any]) -> None:
    signature = functions.fixed()[0].signature
    connection.execute(f"COMMENT ON FUNCTION {signature} IS 'another text'")
    connection.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO PUBLIC")
    connection.commit()
    postgres.migrate(database)
    with as_role(database, FUNCTION) as function, pytest.raises(Denied):
        function.execute("SELECT log_served('[]'::jsonb)")
    with as_role(database, WRITER) as writer:
        assert writer.execute("SELECT log_served('[]'::jsonb)").fetchone() == (0,)
