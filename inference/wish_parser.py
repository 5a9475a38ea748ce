"""A wish in words into what to look for, what to avoid and plain filters, by a language model where there is one.

The wish goes to the model as data, alone: no person, no history, no other wish. What comes back counts only as far as the
schema goes: short texts for the encoder, years, and categories that the catalogue has. It can narrow this one request and
nothing else. Late, wrong or absent, the plain path is taken: the wish as it was said, with `wish-parser` in `degraded`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from inference.breaker import Breaker
from inference.chat import Chat, ChatFailed
from inference.settings import Settings
from inference.store import Store
from inference.telemetry import span
from inference.wishes import FIRST_YEAR, LAST_YEAR, ParsedWish
from schemas import prompts
from schemas.errors import LarderError, Unavailable

logger = logging.getLogger(__name__)

SHARE = 0.4
"""Of the time that a request has left, what it waits for the model at most: the rest must do for an answer without it."""
MAX_LOOK_FOR_CHARS, MAX_AVOID_CHARS, MAX_AVOID, MAX_GENRES = 300, 100, 5, 20
MAX_CATEGORIES = 200
"""So many categories, the most frequent ones, the model may name: more would not fit a small model's context."""
MAX_CATEGORY_CHARS = 60
CATEGORIES_SECONDS = 600
"""How long the catalogue's categories are believed."""
KEPT = 2_048
AT_ONCE = 8
"""Questions under way at a time; a request beyond that takes the plain path at once."""


def _plain(text: str) -> str:
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("a control character")
    return " ".join(text.split())


LookFor = Annotated[str, Field(max_length=MAX_LOOK_FOR_CHARS), AfterValidator(_plain)]
Avoid = Annotated[str, Field(max_length=MAX_AVOID_CHARS), AfterValidator(_plain)]
Year = Annotated[int, Field(ge=FIRST_YEAR, le=LAST_YEAR)]
Names = Annotated[list[Annotated[str, Field(max_length=MAX_CATEGORY_CHARS)]], Field(max_length=MAX_GENRES)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Years(_Strict):
    first: Year | None = Field(alias="from")
    last: Year | None = Field(alias="to")


class _Filters(_Strict):
    years: _Years | None
    genres: Names
    negations: Names


class _Answer(_Strict):
    look_for: LookFor
    avoid: Annotated[list[Avoid], Field(max_length=MAX_AVOID)]
    filters: _Filters


class WrongAnswer(ChatFailed):
    """The server answered, and what the model said will not do: no fault of the server's, and others' wishes may go well."""


def _judge(error: Exception) -> bool | None:
    """Whether the server is well all the same; None: it was not asked."""
    if isinstance(error, WrongAnswer):
        return True
    return False if isinstance(error, ChatFailed) else None


@dataclass(slots=True)
class _Pending:
    """A question that is under way; whoever asks the same meanwhile waits for the same answer."""

    done: threading.Event = field(default_factory=threading.Event)
    found: ParsedWish | None = None
    error: str = ""


@dataclass(slots=True)
class WishParser:
    """Asks `chat` about wishes, in threads beside the requests; safe between threads.

    `categories` gives those of the catalogue, the most frequent first. A late answer is kept for the next who asks.
    """

    chat: Chat
    categories: Callable[[], Sequence[str]]
    budget_ms: int = 800
    version: str = prompts.PARSE_WISH
    breaker: Breaker = field(default_factory=lambda: Breaker("the language model", _judge))
    _kept: OrderedDict[str, ParsedWish] = field(default_factory=OrderedDict, repr=False)
    _under_way: dict[str, _Pending] = field(default_factory=dict, repr=False)
    _known: tuple[float, tuple[str, ...]] = (float("-inf"), ())
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def parse(self, wish: str, left_ms: float) -> ParsedWish:
        """What `wish` asks for, within the budget and the request's share of `left_ms`. Raises Unavailable otherwise."""
        name = self._name(wish)
        wait_seconds = min(self.budget_ms, left_ms * SHARE) / 1_000
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            pending = self._under_way.get(name)
            if pending is None:
                if len(self._under_way) >= AT_ONCE:
                    raise Unavailable("too many wishes are with the language model already")
                pending = self._under_way[name] = _Pending()
                thread = threading.Thread(
                    target=self._work, args=(name, wish, pending), name="larder-wish", daemon=True
                )
                thread.start()
        with span("parse wish", kind="client"):
            if not pending.done.wait(max(wait_seconds, 0)):
                raise Unavailable("the language model is not through with this wish")
        if pending.found is None:
            raise Unavailable(pending.error)
        return pending.found

    def _name(self, wish: str) -> str:
        """What an answer is kept by: a hash, so that no list of wishes lies in memory."""
        text = "\0".join((self.version, self.chat.model, " ".join(wish.split())))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _work(self, name: str, wish: str, pending: _Pending) -> None:
        try:
            with self.breaker.call():
                pending.found = self._ask(wish)
        except LarderError as error:
            pending.error = str(error)
        except Exception as error:  # noqa: BLE001 - whoever waits must be told; the text may quote the wish
            pending.error = f"the wish could not be read: {type(error).__name__}"
        finally:
            with self._lock:
                self._under_way.pop(name, None)
                if pending.found is not None:
                    self._kept[name] = pending.found
                    while len(self._kept) > KEPT:
                        self._kept.popitem(last=False)
            pending.done.set()
        if pending.error:
            logger.warning("a wish took the plain path: %s", pending.error)

    def _ask(self, wish: str) -> ParsedWish:
        known = self._categories()
        instructions = prompts.render_parse_wish(prompts.load(self.version), known)
        said = self.chat.ask(instructions, wish, schema_of(known), self.budget_ms / 1_000)
        return read(said, known, self.version)

    def _categories(self) -> tuple[str, ...]:
        now = time.monotonic()
        at, known = self._known
        if now - at < CATEGORIES_SECONDS:
            return known
        found = [name for name in self.categories() if len(name) <= MAX_CATEGORY_CHARS and name.isprintable()]
        known = tuple(found[:MAX_CATEGORIES])
        self._known = now, known
        return known


def read(said: str, known: Sequence[str], by: str = prompts.PARSE_WISH) -> ParsedWish:
    """The model's answer, held to the schema; categories that the catalogue does not have are left out.

    Raises WrongAnswer for anything else, or if nothing is left of it.
    """
    try:
        answer = _Answer.model_validate_json(said)
    except (ValidationError, RecursionError):
        raise WrongAnswer("the language model's answer is not by the schema") from None
    spelled = {name.casefold(): name for name in known}

    def of_the_catalogue(names: Sequence[str]) -> tuple[str, ...]:
        found = (spelled.get(name.casefold()) for name in names)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    negations = of_the_catalogue(answer.filters.negations)
    genres = tuple(name for name in of_the_catalogue(answer.filters.genres) if name not in negations)
    avoid = tuple(text for text in answer.avoid if text)
    years = answer.filters.years
    first, last = (None, None) if years is None else (years.first, years.last)
    if first is not None and last is not None and first > last:
        raise WrongAnswer("the language model's years end before they begin")
    asked = (first, last) if first is not None or last is not None else None
    if not (answer.look_for or genres or negations or asked):
        raise WrongAnswer("the language model made nothing of the wish")
    return ParsedWish(answer.look_for, avoid, asked, genres, negations, by)


def schema_of(known: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer, for servers that hold a model to one; what they send is checked all the same."""
    year = {"type": ["integer", "null"]}
    names = {"type": "array", "items": {"type": "string", **({"enum": list(known)} if known else {})}}

    def closed(members: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}

    years = {"anyOf": [{"type": "null"}, closed({"from": year, "to": year})]}
    return closed(
        {
            "look_for": {"type": "string"},
            "avoid": {"type": "array", "items": {"type": "string"}},
            "filters": closed({"years": years, "genres": names, "negations": names}),
        }
    )


def open_parser(settings: Settings, store: Store) -> WishParser | None:
    """The parser that the settings ask for, with the categories that `store` has; None if they name no model."""
    if not settings.llm_url:
        return None
    sql = (
        "SELECT c FROM items CROSS JOIN unnest(categories) AS c GROUP BY c ORDER BY count(*) DESC, c "
        f"LIMIT {MAX_CATEGORIES}"
    )
    chat = Chat(settings.llm_url, settings.llm_model, settings.llm_key)
    return WishParser(
        chat,
        lambda: [name for (name,) in store.rows(sql, {}, settings.timeout_ms)],
        settings.llm_timeout_ms,
    )
