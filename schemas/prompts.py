"""Prompt templates: versioned files that say how an item or a wish is written as text."""

from __future__ import annotations

import hashlib
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from schemas.errors import DefinitionError
from schemas.events import Item

FIELDS: dict[str, frozenset[str]] = {
    "item": frozenset({"title", "categories", "description"}),
    "wish": frozenset({"wish"}),
}
ITEM_TEMPLATE = "item.v1"
WISH_TEMPLATE = "wish.v1"


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One version of one wording. `version` is `<kind>.v<number>`, the file's name without `.toml`."""

    kind: str
    version: str
    description: str
    template: str

    def render(self, fields: Mapping[str, str]) -> str:
        """The text with `fields` filled in and runs of blanks closed up."""
        return " ".join(self.template.format_map(fields).split())


@cache
def load(version: str) -> PromptTemplate:
    """The template named `version`. Raises DefinitionError if it is missing or malformed."""
    folder = resources.files("schemas") / "prompt_templates"
    file = folder / f"{version}.toml"
    if not file.is_file():
        known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
        raise DefinitionError(f"there is no prompt template {version!r}; known: {', '.join(known)}")
    try:
        template = PromptTemplate(**tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise DefinitionError(f"prompt template {version!r} is malformed: {error}") from error
    if template.version != version or template.kind not in FIELDS:
        raise DefinitionError(
            f"prompt template {version!r} says version {template.version!r} of kind {template.kind!r}; "
            f"the version must be the file's name and the kind one of {', '.join(FIELDS)}"
        )
    used = {name for _, name, _, _ in string.Formatter().parse(template.template) if name is not None}
    unknown = used - FIELDS[template.kind]
    if unknown:
        raise DefinitionError(
            f"prompt template {version!r} uses {', '.join(sorted(unknown))}; "
            f"a template of kind {template.kind!r} may use {', '.join(sorted(FIELDS[template.kind]))}"
        )
    return template


def render_item(template: PromptTemplate, item: Item) -> str:
    """`item` as the text that is encoded."""
    return template.render(
        {"title": item.title, "categories": ", ".join(item.categories), "description": item.description}
    )


def text_hash(version: str, text: str) -> str:
    """Changes exactly when the text or the template that wrote it changes."""
    return hashlib.sha256(f"{version}\n{text}".encode()).hexdigest()[:32]
