"""The Dagster job that fulfils stored requests to forget people. Nothing it stores or logs names anybody."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg

from orchestration.resources import Larder
from schemas.errors import LarderError


class Erasure(dg.Config):
    """Which request to fulfil: the id that `python -m orchestration.forget --user ID --request` prints.

    Never a person's id: Dagster keeps a run's configuration for as long as it keeps the run.
    """

    request_id: str = ""
    """Empty: every request that waits."""


@dg.op(description="Erase the people whose requests wait, and finish what an interrupted erasure left.")
def erase_people(context: dg.OpExecutionContext, config: Erasure, larder: Larder) -> None:
    from orchestration.compute.forget import finish, fulfil, open_requests

    finished = finish(url=larder.url, lake=larder.lake, artifacts_url=larder.artifacts_url)
    requests = [config.request_id] if config.request_id else open_requests(larder.url)
    failed: list[str] = []
    for request_id in requests:
        try:
            receipt = fulfil(request_id, url=larder.url, lake=larder.lake, artifacts_url=larder.artifacts_url)
        except LarderError as error:
            failed.append(str(error))
        except Exception as error:  # noqa: BLE001 - a driver's message may quote the row, and Dagster keeps messages
            failed.append(
                f"erasure request {request_id} failed with {type(error).__name__}; it waits, run the job again, "
                "or `python -m orchestration.forget --resume`, which shows the whole error"
            )
        else:
            context.log.info(f"receipt {receipt.receipt_id}: removed {receipt.removed}, to rebuild {receipt.stale}")
    metadata: dict[str, Any] = {"fulfilled": len(requests) - len(failed), "finished": finished}
    if failed:
        # Raised outside of the handlers: a cause would be kept with the failure.
        raise dg.Failure("; ".join(failed), metadata=metadata)
    context.add_output_metadata(metadata)


@dg.job(description="Forget the people whose erasure was requested. See the README, “Forgetting a person”.")
def forget_person() -> None:
    erase_people()


@dg.sensor(
    name="erase_who_asked",
    job=forget_person,
    description="Erases who asked to be forgotten over HTTP, or by `make forget REQUEST=1`; they are hidden already.",
    # Off until switched on, as the schedules are.
    minimum_interval_seconds=60,
)
def erase_who_asked(context: dg.SensorEvaluationContext, larder: Larder) -> dg.SensorResult | dg.SkipReason:
    """One run for each request that waits; what failed is tried again the next day."""
    from orchestration.compute.forget import open_requests

    today = datetime.now(UTC).date()
    waiting = open_requests(larder.url)
    if not waiting:
        return dg.SkipReason("nobody waits to be forgotten")
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=f"{request_id}/{today}",
                run_config={"ops": {erase_people.name: {"config": {"request_id": request_id}}}},
            )
            for request_id in waiting
        ]
    )
