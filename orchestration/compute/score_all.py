"""Everybody scored ahead (inference/score_all.py) as the command and the asset run it: threads, sizes and figures in words."""

from __future__ import annotations

from collections.abc import Callable

from threadpoolctl import threadpool_limits

from inference import score_all as core
from inference.score_all import Progress, Report
from inference.scores.batch import Sizes


def score_everybody(
    url: str,
    artifacts_url: str,
    *,
    candidates: int,
    kept: int,
    version: str | None = None,
    restart: bool = False,
    workers: int = 0,
    say: Callable[[Progress], None],
) -> Report:
    """As `inference.score_all.score_all`, with a thread to each of its matrix products."""
    # Each worker multiplies for itself: products that share the processors among them wait for each other.
    with threadpool_limits(1, "blas"):
        return core.score_all(
            url,
            artifacts_url,
            sizes=Sizes(candidates=candidates, kept=kept),
            version=version,
            restart=restart,
            workers=workers,
            say=say,
        )


def told(report: Report) -> str:
    """The outcome in one line."""
    words = [
        f"{report.scored:,} people scored by model {report.version} in {report.seconds:,.1f} s, "
        f"{report.per_second:,.0f} a second ({report.precision} on {report.provider.removesuffix('ExecutionProvider')})"
    ]
    if report.resumed:
        words.append(f"{report.before:,} had been before it was stopped")
    if report.refused:
        words.append(f"{report.refused:,} left out, who were forgotten meanwhile")
    if report.gone:
        words.append(f"{report.gone:,} lists dropped, of people who are not there any more")
    if report.featureless:
        words.append(f"{report.featureless:,} scored without features: no partition of them is fit to be read")
    return "; ".join(words)
