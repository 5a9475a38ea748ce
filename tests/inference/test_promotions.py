"""Promotions and rollbacks under load: no error, and every answer from one version's model, vectors and features."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flips import ask, flips_under_load, make, serving
from released import Released, released

from inference.models import LoadedModels
from inference.ranker import Ranker
from inference.runtime import LarderApplication
from inference.store import Champion
from schemas.errors import Unavailable


def flip_under_load(app: LarderApplication, world: Released, flips: int, callers: int = 3) -> dict[str, int]:
    seen, faults = flips_under_load(app, world, flips, callers)
    assert not faults, faults[:3]
    return seen


@pytest.fixture(scope="module")
def world(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    with released(postgres_url, template, tmp_path_factory.mktemp("released")) as made:
        yield made


@pytest.fixture
def app(world: Released) -> Iterator[LarderApplication]:
    made = make(world)
    yield made
    made.close()


def test_promotions_under_load_are_seen_by_no_request(app: LarderApplication, world: Released) -> None:
    seen = flip_under_load(app, world, 8)
    assert min(seen.values()) > 10, seen


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_hundred_promotions_and_rollbacks_under_load(app: LarderApplication, world: Released) -> None:
    seen = flip_under_load(app, world, 100, callers=8)
    assert min(seen.values()) > 500, seen


def test_a_release_is_loaded_aside_while_the_one_before_answers(
    app: LarderApplication, world: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.versions
    world.promote(first)
    ask(app, "u0")
    wait_for(app, first)
    gate = threading.Event()
    opened = Ranker.__init__

    def slowly(self: Ranker, *arguments: Any, **more: Any) -> None:
        gate.wait(30)
        opened(self, *arguments, **more)

    monkeypatch.setattr(Ranker, "__init__", slowly)
    world.promote(second)
    took: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        answer = json.loads(ask(app, "u0"))
        took.append(time.perf_counter() - started)
        assert (answer["model_version"], answer["degraded"]) == (first, [])
    assert max(took) < 2, "nobody waited for the model"
    gate.set()
    wait_for(app, second)
    assert json.loads(ask(app, "u0"))["model_version"] == second


def wait_for(app: LarderApplication, version: str) -> None:
    give_up_at = time.monotonic() + 30
    while serving(app) != version:
        assert time.monotonic() < give_up_at
        ask(app, "u0")
        time.sleep(0.01)


def test_a_request_that_read_the_alias_before_a_release_does_not_undo_it(
    app: LarderApplication, world: Released
) -> None:
    first, second = world.versions
    world.promote(first)
    wait_for(app, first)
    world.promote(second)
    wait_for(app, second)
    release = app.models._release
    assert release is not None
    late = Champion(first, release.champion.revision - 1, f"models/ranker/{first}")
    assert app.models.follow(late)
    time.sleep(0.3)
    assert serving(app) == second


def test_a_load_that_was_overtaken_is_no_refusal(app: LarderApplication, world: Released) -> None:
    """A version may be wanted, unwanted and wanted again while its first attempt still runs: the second finds it done."""
    first, second = world.versions
    wait_for(app, serving(app) or first)
    other = second if serving(app) == first else first
    champion = Champion(other, 1_000, f"models/ranker/{other}")
    loading = app.models._loading(champion)
    assert loading is not None
    app.models._wanted = None
    with pytest.raises(Unavailable, match="is not the champion any more"):
        loading.get(30_000)
    app.models._wanted = (champion, loading)
    assert app.models.follow(champion)


def test_a_first_model_that_takes_longer_than_the_request_has_is_there_for_the_next(
    world: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = world.versions[0]
    models = LoadedModels(world.artifacts_url)
    gate = threading.Event()
    opened = Ranker.__init__

    def slowly(self: Ranker, *arguments: Any, **more: Any) -> None:
        gate.wait(30)
        opened(self, *arguments, **more)

    monkeypatch.setattr(Ranker, "__init__", slowly)
    champion = Champion(version, 1, f"models/ranker/{version}")
    started = time.perf_counter()
    with pytest.raises(Unavailable, match="still being loaded"):
        models.first(champion, 50)
    assert time.perf_counter() - started < 1
    gate.set()
    assert models.first(champion, 30_000).version == version
