"""The daily assets as one step: the events of a day and every feature view.

They are one step because a step that fails takes every step below it with it, all days alike. Here one bad day of events
stops exactly the days of the views that read it, and the run says failed in the end. Any subset can be selected.
"""

import dagster as dg

from orchestration.assets.events import EVENTS_SPEC, events_stage
from orchestration.assets.features import VIEW_SPECS, view_stage
from orchestration.partitions import daily
from orchestration.ranges import Results, asset_span, walk
from orchestration.resources import Larder
from schemas.checks import EVENT_CHECKS, Check
from schemas.views import VIEWS


def _check_spec(asset: str, check: Check) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(check.name, asset=asset, description=check.description, blocking=check.blocking)


@dg.multi_asset(
    name="daily",
    specs=[EVENTS_SPEC, *VIEW_SPECS],
    check_specs=[
        *(_check_spec("events", check) for check in EVENT_CHECKS),
        *(_check_spec(view.name, check) for view in VIEWS for check in view.checks),
    ],
    partitions_def=daily(),
    backfill_policy=dg.BackfillPolicy.single_run(),
    can_subset=True,
)
def daily_assets(context: dg.AssetExecutionContext, larder: Larder) -> Results:
    """Walk the run's days: events first, then what is made from them."""
    selected = {key.to_user_string() for key in context.selected_asset_keys}
    with asset_span(context), larder.open_engine(context) as engine:
        stages = [events_stage(context, larder), *(view_stage(view, larder, engine) for view in VIEWS)]
        yield from walk(context, [stage for stage in stages if stage.name in selected])
