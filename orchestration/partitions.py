"""The one partitions definition that every daily asset shares, so that ranges can be backfilled together."""

from __future__ import annotations

import dagster as dg

from infra import deployment as deployments


def daily() -> dg.DailyPartitionsDefinition:
    """Days (UTC) from the deployment's first event to yesterday; today is served from the heads of the views."""
    return dg.DailyPartitionsDefinition(start_date=deployments.current().start_date.isoformat(), timezone="UTC")
