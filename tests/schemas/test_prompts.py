"""Prompt templates: known by version, checked when read."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas import prompts
from schemas.errors import DefinitionError
from schemas.events import Item

GOOD = {"kind": '"item"', "version": '"item.v9"', "description": '"d"', "parts": '["{title}"]'}


def written(folder: Path, **changes: str | None) -> Path:
    fields = {name: value for name, value in (GOOD | changes).items() if value is not None}
    file = folder / "item.v9.toml"
    file.write_text("\n".join(f"{name} = {value}" for name, value in fields.items()), encoding="utf-8")
    return file


@pytest.mark.parametrize("version", prompts.versions())
def test_every_template_that_ships_can_be_read(version: str) -> None:
    assert prompts.load(version).version == version


def test_every_kind_has_its_default_and_something_to_compare_it_with() -> None:
    for kind, default in prompts.DEFAULTS.items():
        assert default in prompts.versions(kind)
        assert len(prompts.versions(kind)) >= 3


def test_an_item_is_written_as_the_template_says() -> None:
    item = Item("1", "The Long Way", "A crew leaves.", ("Drama", "Sci-Fi"))
    assert prompts.render_item(prompts.load("item.v1"), item) == "The Long Way. Drama, Sci-Fi. A crew leaves."
    assert prompts.render_item(prompts.load("item.v2"), item) == "The Long Way"
    assert prompts.render_item(prompts.load("item.v3"), item) == "The Long Way. Drama, Sci-Fi"


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Item("1", "The Long Way"), "The Long Way"),
        (Item("1", "", "A crew leaves."), "A crew leaves."),
        (Item("1", " ", "", ("Drama",)), "Drama"),
        (Item("1", ""), ""),
        (Item("1", "{description} {0}"), "{description} {0}"),
    ],
)
def test_what_an_item_does_not_have_leaves_no_trace_in_its_text(item: Item, text: str) -> None:
    assert prompts.render_item(prompts.load("item.v1"), item) == text


def test_a_taste_and_a_wish_are_put_into_words() -> None:
    assert prompts.render_profile(prompts.load("profile.v2"), ["Drama", "Sea"]) == "I like Drama and Sea"
    assert prompts.render_profile(prompts.load("profile.v3"), ["Sea"], ["Ferry", "Tide"]) == "Sea. Ferry, Tide"
    assert prompts.render_wish(prompts.load("wish.v1"), "  slow  space {opera} ") == "slow space {opera}"


def test_an_unknown_version_names_the_known_ones() -> None:
    with pytest.raises(DefinitionError, match=r"no prompt template 'item\.v99'; known: item\.v1, .*wish\.v1"):
        prompts.load("item.v99")
    with pytest.raises(DefinitionError, match="no prompt template"):
        prompts.load("../prompts")


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"parts": None}, "parts", "it is missing"),
        ({"description": None}, "description", "it is missing"),
        ({"language": '"en"'}, "language", "it is unknown"),
        ({"kind": '"poem"'}, "kind", "give one of item, profile, wish"),
        ({"kind": "3"}, "kind", "give a text"),
        ({"description": '" "'}, "description", "give a text"),
        ({"version": '"item.v8"'}, "version", "must be the file's name"),
        ({"parts": '"{title}"'}, "parts", "give a list of texts"),
        ({"parts": "[]"}, "parts", "give a list of texts"),
        ({"parts": '["{title}", 3]'}, "parts", "give a list of texts"),
        (
            {"parts": '["{titel}"]'},
            "parts",
            "uses titel; a template of kind 'item' may use categories, description, title",
        ),
        ({"parts": '["{title"]'}, "parts", "cannot be read"),
        ({"parts": '["{}"]'}, "parts", "cannot be read"),
        ({"parts": '["{title!r}"]'}, "parts", "cannot be read"),
        ({"parts": '["{title:>9}"]'}, "parts", "cannot be read"),
        ({"parts": '["always the same"]'}, "parts", "it uses no field"),
    ],
)
def test_a_bad_file_is_refused_by_name_field_and_way_out(
    tmp_path: Path, changes: dict[str, str | None], field: str, words: str
) -> None:
    with pytest.raises(DefinitionError) as raised:
        prompts.read_template(written(tmp_path, **changes))
    assert str(raised.value).startswith(f"prompt template item.v9.toml, field '{field}': ")
    assert words in str(raised.value)


@pytest.mark.parametrize("content", [b"kind = ", b"\xff\xfe"])
def test_what_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "item.v9.toml").write_bytes(content)
    with pytest.raises(DefinitionError, match=r"item\.v9\.toml is no TOML"):
        prompts.read_template(tmp_path / "item.v9.toml")


def test_a_version_without_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "item.vx.toml").write_text(written(tmp_path, version='"item.vx"').read_text())
    with pytest.raises(DefinitionError, match=r"an? item template is called item\.v<number>"):
        prompts.read_template(tmp_path / "item.vx.toml")


def test_a_file_that_is_right_is_read(tmp_path: Path) -> None:
    assert prompts.read_template(written(tmp_path)).parts == ("{title}",)


def test_the_hash_changes_with_text_and_with_encoder() -> None:
    assert len({prompts.text_hash("1", "a"), prompts.text_hash("1", "b"), prompts.text_hash("2", "a")}) == 3
