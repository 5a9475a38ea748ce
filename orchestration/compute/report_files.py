"""Reports as files below a deployment's folder: `reports/<name>/<day>/`, and the newest one in `reports/<name>/`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LATEST = "latest.json"
Draw = Callable[[Axes], None]


def write_report(folder: Path, name: str, day: date, report: Mapping[str, Any], plots: Mapping[str, Draw]) -> Path:
    """Write `report` as JSON and a PNG for each plot; the folder of that day, which holds `report.json`.

    The newest day's also lie in `reports/<name>/`, the JSON as `latest.json`: that one comes last, so whoever finds it
    finds its pictures, and an old day that is made again does not replace them. Every file appears whole or not at all.
    """
    home = folder / "reports" / name
    place = home / day.isoformat()
    place.mkdir(parents=True, exist_ok=True)
    pictures = []
    for title, draw in plots.items():
        picture = place / f"{title}.png"
        _whole(picture, lambda file, draw=draw: save_plot(file, draw))  # type: ignore[misc]  # bound now, not later
        pictures.append(picture)
    text = json.dumps({**report, "plots": [picture.name for picture in pictures]}, indent=1, allow_nan=False) + "\n"
    _whole(place / "report.json", lambda file: file.write_text(text))
    newest = max(entry.name for entry in home.iterdir() if (entry / "report.json").exists())
    if newest == day.isoformat():
        for old in home.glob("*.png"):
            if old.name not in {picture.name for picture in pictures}:
                old.unlink()
        for picture in pictures:
            _whole(home / picture.name, lambda file, picture=picture: shutil.copyfile(picture, file))  # type: ignore[misc]
        _whole(home / LATEST, lambda file: file.write_text(text))
    return place


def save_plot(file: Path, draw: Draw, *, dpi: int = 110) -> None:
    """One pair of axes as a PNG of about 800 by 450 points."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    figure.savefig(file, format="png", dpi=dpi)


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
