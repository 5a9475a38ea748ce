"""A served world for all tests of a module, in a database that each of them has a copy of."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
from conftest import replace_database

from tests.served_world import ServedWorld, build

_copies = itertools.count()


@contextmanager
def built_in(
    postgres_url: str, template: str, name: str, folder: Path, **sizes: Any
) -> Iterator[tuple[str, ServedWorld]]:
    """A world in a database of its own, made from the migrated `template`: the database's name, and the world."""
    name = f"{name}_{os.getpid()}"
    with database(postgres_url, name, template):
        yield name, build(replace_database(postgres_url, name), folder, **sizes)


@contextmanager
def copy_of(postgres_url: str, built: tuple[str, ServedWorld]) -> Iterator[ServedWorld]:
    """A world as `built_in` gave it, in a copy of its database that may be changed."""
    name = f"{built[0]}_{next(_copies)}"
    with database(postgres_url, name, built[0]):
        yield replace(built[1], url=replace_database(postgres_url, name))


@contextmanager
def database(postgres_url: str, name: str, template: str) -> Iterator[None]:
    """A database called `name`, made from `template`, for as long as the block takes."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
