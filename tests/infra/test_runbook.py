"""The runbook names commands and settings that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def commands(text: str) -> set[str]:
    """Every `make …` written as code in `text`."""
    return {re.sub(r"\s+", " ", found) for found in re.findall(r"`(make [^`]+)`", text)}


def test_every_command_is_a_target_that_takes_its_settings() -> None:
    found = commands(RUNBOOK)
    assert len(found) >= 12
    for command in found:
        _, target, *settings = command.split()
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
        assert recipe or target == "help", command
        for name in (setting.partition("=")[0] for setting in settings):
            assert f"$({name})" in (recipe[1] if recipe else ""), f"{command}: make {target} takes no {name}"


def test_make_itself_understands_every_command() -> None:
    for command in sorted(commands(RUNBOOK)):
        words = [word.replace("…", "2026-11-01").replace("<id>", "u1") for word in command.split()]
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_every_setting_is_read_somewhere() -> None:
    sources = "".join(
        file.read_text() for room in ("infra", "inference", "orchestration") for file in (ROOT / room).rglob("*.py")
    )
    for name in set(re.findall(r"LARDER_[A-Z_]+", RUNBOOK)):
        assert f'"{name}"' in sources, name


def test_every_symptom_has_an_entry() -> None:
    titles = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)
    assert titles == [
        "503", "Answers are degraded", "Answers are slow", "The model got worse", "A deployment failed", "A key leaked",
        "Somebody wants to be forgotten",
    ]  # fmt: skip
    template = (ROOT / "infra" / "aws" / "function.yaml").read_text()
    for named in re.findall(r'Runbook, "([^"]+)"', template):
        assert named in titles
