"""Prompt templates: known by version, checked when read."""

from __future__ import annotations

import pytest

from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item


def test_an_item_is_written_as_the_template_says() -> None:
    item = Item("1", "The Long Way", "A crew leaves.", ("Drama", "Sci-Fi"))
    assert prompts.render_item(prompts.load("item.v1"), item) == "The Long Way. Drama, Sci-Fi. A crew leaves."


def test_an_unknown_version_names_the_known_ones() -> None:
    with pytest.raises(DefinitionError, match=r"no prompt template 'item\.v99'; known: item\.v1, wish\.v1"):
        prompts.load("item.v99")


def test_the_hash_changes_with_text_and_with_template() -> None:
    hashes = {prompts.text_hash("item.v1", "a"), prompts.text_hash("item.v1", "b"), prompts.text_hash("item.v2", "a")}
    assert len(hashes) == 3
