"""Vectors follow the catalogue and the template in use; a model only ever meets texts as it learned them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg
import pytest
import torch
from numpy.typing import NDArray

from inference.encoder import TextEncoder
from inference.ranker import Ranker as ServedRanker
from infra import registry
from orchestration.compute.artifact import ArtifactLabels, write_artifact
from orchestration.compute.encoder import MODEL_VARIABLE, export_encoder
from orchestration.compute.interactions import Interactions
from orchestration.compute.model import ItemTower, Ranker, RankerShape
from orchestration.compute.splits import leave_one_out
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import TrainedRanker
from orchestration.compute.vectors import (
    KEPT_VERSIONS,
    load_text_vectors,
    refresh_item_vectors,
    refresh_text_vectors,
    text_vectors_as,
    tried_versions,
    versions_to_refresh,
    why_not_refreshed,
    written_by,
)
from schemas.errors import ArtifactError, DefinitionError, GateError
from schemas.manifest import MANIFEST_FILE, Manifest
from schemas.ranker import TEXT_DIM
from schemas.views import candidate_features, context_features, fingerprint

ITEMS = [
    ("a", "Lighthouse", "A keeper and a whale.", ["Drama"]),
    ("b", "Shipwreck", "", ["Drama", "Sea"]),
    ("c", "Harbour", "", []),
    ("d", "", "", []),
]
IDS = np.array([item_id for item_id, *_ in ITEMS])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(MODEL_VARIABLE, raising=False)
        export_encoder(tmp_path_factory.mktemp("encoder") / "minilm")
    return TextEncoder(tmp_path_factory.getbasetemp() / "encoder0" / "minilm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, encoder: TextEncoder) -> Path:
    """The artefact of a ranker as it is initialised, with this deployment's features."""
    folder = tmp_path_factory.mktemp("model")
    people, n = 6, 18
    events = Interactions(
        np.array([f"u{number}" for number in range(people)]),
        IDS,
        np.repeat(np.arange(people), 3).astype(np.int32),
        (np.arange(n) % len(IDS)).astype(np.int32),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.ones(n, np.int64),
        np.full(n, np.nan, np.float32),
    )
    torch.manual_seed(0)
    ranker = Ranker(RankerShape("small", len(context_features()), len(candidate_features()))).eval()
    texts = torch.from_numpy(np.random.default_rng(0).standard_normal((len(IDS), TEXT_DIM)).astype(np.float32))
    tower = ItemTower(texts, ranker.user.out_features, torch.zeros(len(IDS), dtype=torch.bool))
    write_artifact(
        TrainedRanker(ranker, tower, TrainConfig(), [], {}, (1.0, 0.0), 0.0),
        folder,
        ArtifactLabels(
            fingerprint(), context_features(), candidate_features(), encoder.version, "item.v1", "wish.v1", "2026-01-01"
        ),
        item_ids=IDS,
        popular_items=[],
        requests=leave_one_out(events).queries,
    )
    return folder


def another(model: Path, folder: Path, **changes: object) -> tuple[Path, Manifest]:
    """The same files under a manifest that says something else."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = replace(Manifest.from_json((model / MANIFEST_FILE).read_text()), **changes)  # type: ignore[arg-type]
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return folder, manifest


@pytest.fixture
def catalogue(connection: psycopg.Connection) -> psycopg.Connection:
    for item in ITEMS:
        add(connection, *item)
    return connection


def add(connection: psycopg.Connection, item_id: str, title: str, description: str, categories: list[str]) -> None:
    connection.execute(
        "INSERT INTO items (item_id, title, description, categories) VALUES (%s, %s, %s, %s)",
        (item_id, title, description, categories),
    )
    connection.commit()


def vectors_of(connection: psycopg.Connection, version: str) -> dict[str, NDArray[np.float32]]:
    rows = connection.execute(
        "SELECT item_id, vector FROM item_vectors WHERE model_version = %s", (version,)
    ).fetchall()
    return {item_id: vector.to_numpy().astype(np.float32) for item_id, vector in rows}


def test_another_template_encodes_only_what_it_writes_differently(
    catalogue: psycopg.Connection, encoder: TextEncoder
) -> None:
    assert refresh_text_vectors(catalogue, encoder, template="item.v1").encoded == 4
    assert refresh_text_vectors(catalogue, encoder, template="item.v1").encoded == 0
    # Title and categories: without a description both templates write the same.
    assert refresh_text_vectors(catalogue, encoder, template="item.v3").encoded == 1
    assert len(load_text_vectors(catalogue, IDS, written_by("item.v3", encoder.version))) == 4
    with pytest.raises(
        DefinitionError, match=r"written by item\.v3 .*, wanted are those by item\.v1 .*materialise text_vectors"
    ):
        load_text_vectors(catalogue, IDS, written_by("item.v1", encoder.version))


def test_a_training_that_is_under_way_keeps_its_texts_when_another_template_wins(
    catalogue: psycopg.Connection, encoder: TextEncoder
) -> None:
    refresh_text_vectors(catalogue, encoder, template="item.v1")
    before = load_text_vectors(catalogue, IDS, written_by("item.v1", encoder.version))
    refresh_text_vectors(catalogue, encoder, template="item.v2")
    assert text_vectors_as(catalogue, IDS, "item.v1", encoder) == pytest.approx(before, abs=1e-5)


def test_items_without_text_are_counted_and_still_have_a_vector(
    catalogue: psycopg.Connection, encoder: TextEncoder
) -> None:
    add(catalogue, "e", "", "", [])
    report = refresh_text_vectors(catalogue, encoder)
    assert (report.items, report.without_text, report.title_only) == (5, 2, 1)
    found = load_text_vectors(catalogue, np.array(["c", "d", "e"]), written_by("item.v1", encoder.version))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-3)
    assert (found[1] == found[2]).all()
    assert not (found[0] == found[1]).all()


def test_a_model_is_never_fed_texts_of_another_template(
    catalogue: psycopg.Connection, encoder: TextEncoder, model: Path
) -> None:
    refresh_text_vectors(catalogue, encoder, template="item.v1")
    refresh_item_vectors(catalogue, model, encoder)
    served = ServedRanker(model)
    before = vectors_of(catalogue, served.version)
    refresh_text_vectors(catalogue, encoder, template="item.v2")
    add(catalogue, "new", "Ferry", "A crossing at night.", ["Sea"])
    refresh_text_vectors(catalogue, encoder, template="item.v2")
    report = refresh_item_vectors(catalogue, model, encoder)
    assert report.encoded == 1
    after = vectors_of(catalogue, served.version)
    assert all((after[item_id] == before[item_id]).all() for item_id in before)
    own = served.project(encoder.encode(["Ferry. Sea. A crossing at night."]))[0]
    assert after["new"] == pytest.approx(own, abs=1e-3)
    others = served.project(encoder.encode(["Ferry"]))[0]
    assert np.abs(after["new"] - others).max() > 0.01


def test_a_model_of_another_encoder_or_a_lost_template_is_skipped_with_the_reason(
    tmp_path: Path, catalogue: psycopg.Connection, encoder: TextEncoder, model: Path
) -> None:
    folder, _ = another(model, tmp_path / "encoder", encoder_version="other")
    assert "encoded by other, the encoder is now" in str(why_not_refreshed(folder, encoder))
    with pytest.raises(DefinitionError, match="cannot be given item vectors"):
        refresh_item_vectors(catalogue, folder, encoder)
    lost, _ = another(model, tmp_path / "template", item_template="item.v99")
    assert "item.v99 is no longer among schemas/prompt_templates" in str(why_not_refreshed(lost, encoder))
    assert why_not_refreshed(model, encoder) is None


def test_a_rollback_works_after_a_new_item_came(
    tmp_path: Path, catalogue: psycopg.Connection, encoder: TextEncoder, model: Path
) -> None:
    refresh_text_vectors(catalogue, encoder)
    made = [another(model, tmp_path / f"m{number}", trained_until=f"2026-01-0{number}") for number in range(1, 6)]
    for folder, manifest in made:
        registry.register(catalogue, manifest, folder.name)
        registry.record_gate(catalogue, manifest.version, True, {})
        catalogue.commit()
        refresh_item_vectors(catalogue, folder, encoder)
        registry.promote(catalogue, manifest.version)
        catalogue.commit()
    add(catalogue, "new", "Ferry", "", ["Sea"])
    refresh_text_vectors(catalogue, encoder)
    wanted = versions_to_refresh(catalogue)
    assert [path for _, path in wanted] == ["m3", "m4", "m5"]
    assert len(wanted) == KEPT_VERSIONS
    for _, path in wanted:
        refresh_item_vectors(catalogue, tmp_path / path, encoder)
    before_last = made[3][1].version
    assert registry.promote(catalogue, before_last).version == before_last
    catalogue.commit()
    oldest = made[0][1].version
    with pytest.raises(GateError, match="lacks vectors for 1 items"):
        registry.promote(catalogue, oldest)
    assert (oldest, "m1") in versions_to_refresh(catalogue, [oldest])
    refresh_item_vectors(catalogue, tmp_path / "m1", encoder)
    assert registry.promote(catalogue, oldest).version == oldest


def test_an_unknown_version_to_refresh_is_named(connection: psycopg.Connection) -> None:
    with pytest.raises(DefinitionError, match="no model version nobody"):
        versions_to_refresh(connection, ["nobody"])


def test_versions_that_experiments_name_learn_of_new_items_too(catalogue: psycopg.Connection, tmp_path: Path) -> None:
    known, unknown, file = "0123456789abcdef", "f" * 16, tmp_path / "experiments.toml"
    assert tried_versions(catalogue, str(file)) == []
    catalogue.execute(
        "INSERT INTO model_versions (version, name, path, manifest) VALUES (%s, 'ranker', 'm', '{}')", (known,)
    )
    arms = "".join(
        f'[experiments.e.arms.a{place}]\nshare = 0.5\nmodel_version = "{version}"\n'
        for place, version in enumerate((known, unknown))
    )
    file.write_text(f"[experiments.e]\nstart = 2026-01-01T00:00:00Z\n{arms}")
    assert tried_versions(catalogue, str(file)) == [known], (
        "one that nobody registered is what the function complains of"
    )
    file.write_text(f"[experiments.e]\nstart = 2020-01-01T00:00:00Z\nend = 2021-01-01T00:00:00Z\n{arms}")
    assert tried_versions(catalogue, str(file)) == []
    file.write_text("broken")
    assert tried_versions(catalogue, str(file)) == []


def test_a_manifest_with_its_features_in_another_order_is_refused(tmp_path: Path, model: Path) -> None:
    names = context_features()
    folder, _ = another(model, tmp_path / "order", context_features=(names[1], names[0], *names[2:]))
    with pytest.raises(ArtifactError, match=re.escape(f"has {names[1]!r} where this code has {names[0]!r}")):
        ServedRanker(folder)
