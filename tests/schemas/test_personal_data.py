"""The data map is true: it is what the declaration says, and no table that holds personal data is missing in it."""

from __future__ import annotations

import psycopg

from infra import data_map
from schemas import tables
from schemas.personal_data import places


def test_the_file_is_what_the_declaration_says() -> None:
    assert data_map.DOCUMENT.read_text(encoding="utf-8") == data_map.text(), "run `make data-map`"


def test_every_table_of_a_database_with_somebodys_id_has_a_place(connection: psycopg.Connection) -> None:
    columns = data_map.columns_of(connection)
    assert "public.user_history" in columns
    assert data_map.undeclared(places(), columns) == []
    # And it would be noticed: a table that is added later, in whatever schema, by either kind of id.
    connection.execute(
        "CREATE SCHEMA later; CREATE TABLE later.letters (user_id text); CREATE TABLE seen (event_id text)"
    )
    assert data_map.undeclared(places(), data_map.columns_of(connection)) == ["later.letters", "public.seen"]


def test_every_place_is_a_table_that_is_there_with_the_columns_that_are_told(connection: psycopg.Connection) -> None:
    there, told = data_map.columns_of(connection), dict(data_map.declared_tables())
    for place in places():
        if not place.table:
            assert place.readers, place.name
            continue
        assert set(told[place.table]) == set(there[place.table]), place.table
        if place.expiry is not None:
            assert place.expiry.column in there[place.table]
            assert str(place.expiry.days) in place.kept
            assert place.why
    names = [place.name for place in places()]
    assert len(set(names)) == len(names)


def test_who_may_read_is_who_can(connection: psycopg.Connection) -> None:
    """What the map says of each role is what the database does."""
    for place in places():
        if not place.table:
            continue
        said = data_map.may_read(place.table)
        for role in ("larder_orchestrator", "larder_function", "larder_writer"):
            row = connection.execute(
                "SELECT has_table_privilege(%s, %s, 'SELECT'), has_any_column_privilege(%s, %s, 'SELECT')",
                (role, place.table, role, place.table),
            ).fetchone()
            assert row is not None
            whole, some = row
            assert (f"`{role}`" in said) == some, (place.table, role)
            assert (f"`{role}` (only" in said) == (some and not whole), (place.table, role)


def test_a_table_with_an_odd_name_for_a_persons_id_would_be_seen() -> None:
    """Every column of ours whose comment or name speaks of a person is one that is looked for."""
    suspects = [
        f"{table.name}.{column.name}"
        for table in tables.metadata.sorted_tables
        for column in table.columns
        if "user" in column.name and column.name not in (*data_map.PERSONAL_COLUMNS, "user_chars")
    ]
    assert suspects == []
