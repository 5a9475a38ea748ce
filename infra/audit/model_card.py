"""The model card of the version that serves: plain Markdown and figures, from its manifest and its gate record.

Mitchell et al., Model Cards for Model Reporting (FAT* 2019): what it is, what for, from what, how good, for whom, limits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from schemas.manifest import Manifest

OURS = "ranker"
SPLITS = {
    "leave_one_out": "each person's last event, held out",
    "time_split": "all events after an instant, held out",
}
CUTOFF = "10"


@dataclass(frozen=True, slots=True)
class Card:
    """What the registry knows of the version that serves."""

    version: str
    path: str
    manifest: Manifest
    manifest_json: str
    gate: Mapping[str, Any]
    registered_at: datetime
    judged_at: datetime
    released_at: datetime
    revision: int


def read(connection: psycopg.Connection[Any]) -> Card | None:
    """The champion's card, or None while nothing is released."""
    row = connection.execute(
        "SELECT v.version, v.path, v.manifest, g.record, v.created_at, g.created_at, a.updated_at, a.revision "
        "FROM model_aliases AS a JOIN model_versions AS v USING (version) JOIN gate_records AS g USING (version) "
        "WHERE a.alias = 'champion'"
    ).fetchone()
    if row is None:
        return None
    version, path, raw, gate, registered_at, judged_at, released_at, revision = row
    manifest = Manifest.from_json(json.dumps(raw))
    # As it was hashed: whoever reads it can see that the version is the hash of this very text.
    return Card(version, path, manifest, manifest.to_json(), gate, registered_at, judged_at, released_at, revision)


def text(card: Card, figure_names: Sequence[str] = ()) -> str:
    """The card as Markdown, with `figure_names` shown where they belong."""
    manifest = card.manifest
    parts = [
        f"# Model card: {manifest.name} {card.version}",
        ""
        if manifest.version == card.version
        else f"**The registry's manifest hashes to {manifest.version}, not to this version: it was changed.**",
        "## What it is",
        _list(
            {
                "architecture": f"a transformer over a person's events that scores candidates, size `{manifest.size}`, "
                f"{manifest.dim} dimensions",
                "trained on events until": manifest.trained_until,
                "registered": f"{card.registered_at:%Y-%m-%d %H:%M} UTC",
                "judged": f"{card.judged_at:%Y-%m-%d %H:%M} UTC",
                "serves since": f"{card.released_at:%Y-%m-%d %H:%M} UTC (move {card.revision} of the alias)",
                "seed": str(manifest.seed),
                "text encoder": manifest.encoder_version,
                "prompt templates": f"{manifest.item_template}, {manifest.profile_template}, {manifest.wish_template}",
                "weight of a wish": f"{manifest.wish_weight:g} logits per unit of cosine",
            }
        ),
        "## What it is for",
        "To put a catalogue's items in order for a person, from what they did before and what they say they want. It is for "
        "finding something in a catalogue. It is not made to decide about people: not for credit, work, health or prices.",
        "## What it is made from",
        "Events of people who have not refused to be personalised, and texts of the catalogue: see data-map.md. "
        f"Features of the person: {_names(manifest.context_features)}. Features of a candidate: "
        f"{_names(manifest.candidate_features)}. They are computed from events alone: no profile is read.",
        "## How good it is",
        *(_quality(name, manifest.quality[name]) for name in SPLITS if name in manifest.quality),
        *(f"![{name}]({name})" for name in figure_names if "quality" in name),
    ]
    if not any(name in manifest.quality for name in SPLITS):
        parts.append("**Nothing was measured**: this version was registered without an evaluation.")
    parts += ["## For whom it is better or worse", *_for_whom(manifest.quality)]
    parts += [f"![{name}]({name})" for name in figure_names if "segments" in name]
    parts += [
        "## What it had to prove",
        _gate(card.gate),
        "Parity of what is served with what was trained, and time to score:",
        _list({key: _figure(value) for key, value in _flat(manifest.parity).items()}),
        _list({key: f"{value:.2f} ms" for key, value in sorted(manifest.latency_ms.items())}),
        "## Files",
        _table(
            ["file", "bytes", "SHA-256"],
            [[name, f"{file.size_bytes:,}", f"`{file.sha256}`"] for name, file in sorted(manifest.files.items())],
        ),
        "## Limits",
        "It learns from what was shown and chosen: what was never shown has had no chance, and what is popular has had many. "
        "reports/fairness measures that where it is there. Figures on held-out events say how well choices are foretold, not how "
        "content people are. Someone new is known only by what everybody likes. A forgotten person's events are in no later "
        "training; this version's weights may still have learned from them.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(card: Card) -> dict[str, bytes]:
    """PNG by file name: NDCG@10 of every row per split, and of our row per segment; none of what was not measured."""
    found: dict[str, bytes] = {}
    for split, what in SPLITS.items():
        measured = card.manifest.quality.get(split)
        if not measured or not measured.get("rows"):
            continue
        rows = [
            (row["name"], row["ndcg"][CUTOFF], *row["interval"]) for row in measured["rows"] if CUTOFF in row["ndcg"]
        ]
        found[f"figures/quality-{split}.png"] = _bars(rows, f"NDCG@10, {what}")
        segments = measured.get("segments", {}).get(OURS, [])
        if segments:
            rows = [(f"{one['name']} ({one['labels']:,})", one["ndcg"], one["low"], one["high"]) for one in segments]
            found[f"figures/segments-{split}.png"] = _bars(rows, f"NDCG@10 of the {OURS} by segment, {what}")
    return found


def _bars(rows: Sequence[tuple[str, float, float, float]], title: str) -> bytes:
    """A bar per row `(name, value, low, high)` with its 95 % interval."""
    from matplotlib.figure import Figure  # no pyplot: that keeps figures for a screen that is not there

    figure = Figure(figsize=(7, 0.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, *_ in rows][::-1]
    values = [value for _, value, _, _ in rows][::-1]
    low = [max(value - low, 0) for _, value, low, _ in rows][::-1]
    high = [max(high - value, 0) for _, value, _, high in rows][::-1]
    colours = ["#0a6" if OURS in name or OURS in title else "#999" for name in names]
    axes.barh(names, values, xerr=[low, high], color=colours, ecolor="#333", capsize=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    # Without the moment and the library's version, equal figures are equal bytes.
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _quality(name: str, measured: Mapping[str, Any]) -> str:
    head = ["", *(f"{metric}@{k}" for metric in ("HR", "NDCG", "MRR") for k in ("5", "10", "50")), "NDCG@10 95 %"]
    lines = [
        [
            row["name"],
            *(_figure(row[metric].get(k)) for metric in ("hr", "ndcg", "mrr") for k in ("5", "10", "50")),
            f"{row['interval'][0]:.4f}–{row['interval'][1]:.4f}",
        ]
        for row in measured["rows"]
    ]
    gains = [
        [other, f"{gain['mean']:+.4f}", f"{gain['low']:+.4f} to {gain['high']:+.4f}"]
        for other, gain in sorted(measured.get("gains", {}).items())
    ]
    return "\n\n".join(
        [
            f"### {SPLITS[name]}",
            f"{measured['labels']:,} labels of {measured['people']:,} people, all items ranked, those seen before left out.",
            _table(head, lines),
            *([_table([f"{OURS} over", "NDCG@10 gained", "95 %, paired over people"], gains)] if gains else []),
        ]
    )


def _for_whom(quality: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name, what in SPLITS.items():
        segments = quality.get(name, {}).get("segments", {}).get(OURS, [])
        if segments:
            rows = [
                [one["name"], f"{one['labels']:,}", _figure(one["ndcg"]), f"{one['low']:.4f}–{one['high']:.4f}"]
                for one in segments
            ]
            found += [f"### {what}", _table(["segment", "labels", "NDCG@10", "95 %"], rows)]
    return found or ["**Nothing was measured** by segment."]


def _gate(record: Mapping[str, Any]) -> str:
    words = record.get("words", [])
    listed = [words] if isinstance(words, str) else list(words)
    return "\n".join("- " + " ".join(str(word).split()) for word in listed) or "- passed; the record has no words"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            found[f"{prefix}{name}"] = value
    return found


def _figure(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(features: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in features) or "none"


def _list(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
