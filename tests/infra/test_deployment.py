"""Deployments: named after their data, remembered, picked by name."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from infra import deployment
from infra.deployment import Deployment
from schemas.errors import SettingsError


@pytest.mark.parametrize(
    ("data", "name"),
    [(None, "simulated"), ("/data/ml-100k/", "ml-100k"), ("s3://bucket/some/prefix", "prefix"), ("a b", "a-b")],
)
def test_a_deployment_is_named_after_its_data(data: str | None, name: str) -> None:
    assert deployment.name_for(data) == name


def test_what_was_saved_is_current(larder_home: Path) -> None:
    saved = Deployment("shop", "/data/shop", date(2026, 1, 2), 14)
    saved.save()
    assert deployment.current() == saved == deployment.load("shop")


def test_an_unknown_deployment_names_the_known_ones(larder_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Deployment("shop", None, date(2026, 1, 2)).save()
    monkeypatch.setenv("DEPLOYMENT", "shpo")
    with pytest.raises(SettingsError, match="no deployment 'shpo'; known: shop"):
        deployment.current()


@pytest.mark.parametrize("name", ["../shop", "/tmp/shop", ".", "a shop"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    name: str, larder_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYMENT", name)
    with pytest.raises(SettingsError, match=r"DEPLOYMENT is .*; give letters, digits"):
        deployment.current()


def test_a_broken_record_is_not_guessed_at(larder_home: Path) -> None:
    (larder_home / "shop").mkdir(parents=True)
    (larder_home / "shop" / "deployment.json").write_text("{")
    with pytest.raises(SettingsError, match="not a deployment record"):
        deployment.load("shop")
