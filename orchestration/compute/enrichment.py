"""A few words about each item by a language model, where there is one: they are encoded with the item's own text.

An item's text goes to the model alone, as data; what comes back is one short text, checked, and touches the vector of that
item and no other. Whoever can write an item's description could have written as much there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import psycopg
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from inference.chat import Chat, ChatFailed
from orchestration.compute.telling import Say, silent
from schemas import prompts
from schemas.errors import LarderError

VERSION = "enrich_item.v1"
MAX_ABOUT_CHARS = 300
MAX_TEXT_CHARS = 4_000
"""So much of an item's description is sent: a book is not."""
AT_ONCE = 4
BATCH = 32
GIVE_UP_AFTER = 8
"""So many items in a row that the server did not answer for end the run: it is not there."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"about": {"type": "string"}},
    "required": ["about"],
    "additionalProperties": False,
}


def _plain(text: str) -> str:
    if any(ord(char) < 32 and char not in "\t\n" for char in text):
        raise ValueError("a control character")
    return " ".join(text.split())


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    about: Annotated[str, Field(max_length=MAX_ABOUT_CHARS), AfterValidator(_plain)]


@dataclass(frozen=True, slots=True)
class EnrichmentReport:
    """Items in the catalogue, those that got new words, those that kept theirs, those whose answer would not do."""

    items: int
    written: int
    kept: int
    refused: int


@dataclass(frozen=True, slots=True)
class _Todo:
    item_id: str
    question: str
    digest: str


def enrich(
    connection: psycopg.Connection[Any],
    chat: Chat,
    *,
    timeout_seconds: float = 20.0,
    limit: int | None = None,
    progress: Say = silent,
) -> EnrichmentReport:
    """Ask about the items that are new or changed, at most `limit`; each batch is committed, so a repeat goes on from there.

    Another model or template asks anew. An answer that will not do leaves the item as it is, and is asked for again by the
    next run. Raises ChatFailed, with what was done kept, when the server does not answer several times in a row.
    """
    writer = f"{VERSION} {chat.model}"
    instructions = prompts.load(VERSION).render({"limit": str(MAX_ABOUT_CHARS)})
    rows = connection.execute(
        "SELECT i.item_id, i.title, i.description, i.categories, e.source_hash FROM items AS i "
        "LEFT JOIN item_enrichments AS e USING (item_id) ORDER BY i.item_id"
    ).fetchall()
    connection.commit()
    todo = [_todo(item_id, title, text, categories, writer) for item_id, title, text, categories, _ in rows]
    new = [one for one, row in zip(todo, rows, strict=True) if one.digest != row[4]]
    written = refused = silent = 0

    def ask(one: _Todo) -> str | LarderError:
        try:
            return read(chat.ask(instructions, one.question, SCHEMA, timeout_seconds))
        except LarderError as error:
            return error

    wanted = list(islice(new, limit))
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="larder-enrich") as pool:
        for part in (wanted[begin : begin + BATCH] for begin in range(0, len(wanted), BATCH)):
            said = list(pool.map(ask, part))
            good = [(one, about) for one, about in zip(part, said, strict=True) if isinstance(about, str)]
            _store(connection, good, writer)
            written, refused = written + len(good), refused + len(part) - len(good)
            for about in said:
                silent = silent + 1 if isinstance(about, ChatFailed) and not isinstance(about, BadAnswer) else 0
                if silent >= GIVE_UP_AFTER:
                    raise ChatFailed(
                        f"the language model's server did not answer {silent} times in a row, after {written:,} of "
                        f"{len(wanted):,} items: {about}; run it again when it does, it goes on from here"
                    )
            progress(f"{written + refused:,} of {len(wanted):,} items asked about")
    return EnrichmentReport(len(rows), written, len(rows) - len(new), refused)


class BadAnswer(ChatFailed):
    """The server answered, and what the model said will not do."""


def read(said: str) -> str:
    """The words of an answer, empty if the model knows none. Raises BadAnswer, which does not quote it."""
    try:
        return _Answer.model_validate_json(said).about
    except (ValidationError, RecursionError):
        raise BadAnswer("the language model's answer is not by the schema") from None


def _todo(item_id: str, title: str, description: str, categories: Iterable[str], writer: str) -> _Todo:
    # JSON keeps the parts apart: a title that looks like the end of one stays a title.
    item = {"title": title, "categories": list(categories), "description": description[:MAX_TEXT_CHARS]}
    question = json.dumps(item, ensure_ascii=False)
    return _Todo(item_id, question, hashlib.sha256(f"{writer}\n{question}".encode()).hexdigest()[:32])


def _store(connection: psycopg.Connection[Any], good: list[tuple[_Todo, str]], writer: str) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(
            # An item that left the catalogue meanwhile has no row to refer to.
            "INSERT INTO item_enrichments (item_id, source_hash, about, written_by) SELECT item_id, %s, %s, %s FROM items "
            "WHERE item_id = %s ON CONFLICT (item_id) DO UPDATE SET source_hash = excluded.source_hash, "
            "about = excluded.about, written_by = excluded.written_by, written_at = now()",
            [(one.digest, about, writer, one.item_id) for one, about in good],
        )
