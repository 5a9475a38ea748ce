"""Prompt templates: versioned files that say how an item, a person's taste or a wish is written as text.

    kind     fields                           written for
    item     title, categories, description   the encoder of items: text vectors, and all that is made from them
    profile  categories, titles               a taste as its owner might say it: what training and measurement wish for
    wish     wish                             the encoder of wishes: what a person typed, or a profile
    parse_wish   categories                  a language model, where there is one: the wish itself goes beside it, as data
    enrich_item  limit                       a language model, where there is one: the item itself goes beside it, as data

Which version of a kind is used is measured by the asset `prompt_evaluation` and recorded in Postgres (`prompt_winners`);
`DEFAULTS` hold until then. A model's manifest names the versions that it was trained with, and they stay with it.
"""

from __future__ import annotations

import hashlib
import json
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from schemas.errors import DefinitionError
from schemas.events import Item

FIELDS: dict[str, frozenset[str]] = {
    "item": frozenset({"title", "categories", "description"}),
    "profile": frozenset({"categories", "titles"}),
    "wish": frozenset({"wish"}),
    "parse_wish": frozenset({"categories"}),
    "enrich_item": frozenset({"limit"}),
}
MEASURED = ("item", "profile", "wish")
"""Kinds whose versions are compared by what they score with the encoder; of the others, code names the version."""
PARSE_WISH = "parse_wish.v1"
DEFAULTS: dict[str, str] = {kind: f"{kind}.v1" for kind in MEASURED}
"""The versions that hold while none is recorded as its kind's winner."""
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One version of one wording. `version` is `<kind>.v<number>`, the file's name without `.toml`.

    `parts` are joined by a full stop; a part of which a field is empty is left out.
    """

    kind: str
    version: str
    description: str
    parts: tuple[str, ...]

    def render(self, values: Mapping[str, str]) -> str:
        """The text with `values` filled in and runs of blanks closed up; empty if there is nothing to say."""
        said = [part.format_map(values) for part in self.parts if all(values[name].strip() for name in _names(part))]
        return " ".join(". ".join(said).split())


def folder() -> Traversable:
    """Where the templates lie, one file each."""
    return resources.files("schemas") / "prompt_templates"


def versions(kind: str | None = None) -> tuple[str, ...]:
    """The names of all templates that are measured, or of those of one kind, by kind and number."""
    names = [entry.name.removesuffix(SUFFIX) for entry in folder().iterdir() if entry.name.endswith(SUFFIX)]
    kinds = MEASURED if kind is None else (kind,)
    chosen = [name for name in names if name.split(".v")[0] in kinds]
    return tuple(sorted(chosen, key=lambda name: (name.split(".v")[0], len(name), name)))


@cache
def load(version: str) -> PromptTemplate:
    """The template named `version`. Raises DefinitionError if it is missing or malformed."""
    known = [name for kind in FIELDS for name in versions(kind)]
    if version not in known:
        raise DefinitionError(
            f"there is no prompt template {version!r}; known: {', '.join(known)}; "
            f"add schemas/prompt_templates/{version}{SUFFIX}, or name a known one"
        )
    return read_template(folder() / f"{version}{SUFFIX}")


def read_template(file: Traversable) -> PromptTemplate:
    """The template in `file`. Raises DefinitionError naming file, field and way out if it breaks the schema."""

    def refuse(field: str, why: str) -> DefinitionError:
        return DefinitionError(f"prompt template {file.name}, field {field!r}: {why}")

    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DefinitionError(f"prompt template {file.name} is no TOML ({error}); mend the file") from error
    wanted = [field.name for field in fields(PromptTemplate)]
    for name in raw:
        if name not in wanted:
            raise refuse(name, f"it is unknown; a template has {', '.join(wanted)}: remove it")
    for name in wanted:
        if name not in raw:
            raise refuse(name, f"it is missing; a template has {', '.join(wanted)}: add it")
    for name in ("kind", "version", "description"):
        if not isinstance(raw[name], str) or not raw[name].strip():
            raise refuse(name, f"it is {raw[name]!r}; give a text")
    kind, version, parts = raw["kind"], raw["version"], raw["parts"]
    if kind not in FIELDS:
        raise refuse("kind", f"it is {kind!r}; give one of {', '.join(FIELDS)}")
    if version != file.name.removesuffix(SUFFIX):
        raise refuse(
            "version", f"it is {version!r}; it must be the file's name without {SUFFIX}: rename one of the two"
        )
    if version.removeprefix(f"{kind}.v").strip("0123456789") or not version.removeprefix(f"{kind}.v"):
        raise refuse("version", f"it is {version!r}; a {kind} template is called {kind}.v<number>")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise refuse("parts", f'it is {parts!r}; give a list of texts, as in ["{{{min(FIELDS[kind])}}}"]')
    used: set[str] = set()
    for part in parts:
        try:
            used |= _names(part)
        except ValueError as error:
            raise refuse(
                "parts", f"{part!r} cannot be read ({error}); write fields as {{name}}, a brace as {{{{"
            ) from error
    if unknown := sorted(used - FIELDS[kind]):
        raise refuse(
            "parts",
            f"it uses {', '.join(unknown)}; a template of kind {kind!r} may use {', '.join(sorted(FIELDS[kind]))}",
        )
    if not used:
        raise refuse(
            "parts", f"it uses no field, so every text would be the same; use {', '.join(sorted(FIELDS[kind]))}"
        )
    return PromptTemplate(kind, version, raw["description"], tuple(parts))


def _names(part: str) -> set[str]:
    """The fields that `part` names. Raises ValueError for anything but `{name}`."""
    names = set()
    for _, name, form, conversion in string.Formatter().parse(part):
        if name is None:
            continue
        if form or conversion or not name.isidentifier():
            raise ValueError(
                f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}} is no field"
            )
        names.add(name)
    return names


def render_item(template: PromptTemplate, item: Item) -> str:
    """`item` as the text that is encoded; empty if it has nothing that the template names."""
    return template.render(
        {"title": item.title, "categories": ", ".join(item.categories), "description": item.description}
    )


def render_profile(template: PromptTemplate, categories: Sequence[str], titles: Sequence[str] = ()) -> str:
    """A taste for `categories`, of which `titles` are examples, in words."""
    return template.render({"categories": " and ".join(categories), "titles": ", ".join(titles)})


def render_wish(template: PromptTemplate, wish: str) -> str:
    """A wish as the text that is encoded."""
    return template.render({"wish": wish})


def render_parse_wish(template: PromptTemplate, categories: Sequence[str]) -> str:
    """The instructions for a language model; `categories` are those of the catalogue that it may name."""
    return template.render({"categories": json.dumps(list(categories), ensure_ascii=False)})


def text_hash(encoder_version: str, text: str) -> str:
    """Changes exactly when the text or the encoder changes."""
    return hashlib.sha256(f"{encoder_version}\n{text}".encode()).hexdigest()[:32]
