"""The month, in order: learn, then day by day serve, sleep, watch, and act on what is found."""

from __future__ import annotations

from inference.encoder import TextEncoder
from infra.deploy import roll_back_model
from orchestration.compute.encoder import export_encoder
from orchestration.compute.telling import Say
from orchestration.month.learn import learn
from orchestration.month.night import first_night, night, watch_drift, watch_experiments
from orchestration.month.place import Place
from orchestration.month.plan import LEFT_DAYS, REST_DAYS, Plan
from orchestration.month.power import rehearse
from orchestration.month.serve import Clock, Street, application, serve_day
from orchestration.month.source import Organic
from orchestration.month.story import Day, Story
from orchestration.sources.simulator import Simulator


def simulate(place: Place, plan: Plan, say: Say) -> tuple[Story, Street]:
    """Live through the month at `place`; what was seen, and everybody who was there."""
    until = plan.midnight(plan.days + 1)
    street = Street(plan, Organic(plan.world, until), Simulator(plan.world, until))
    story = Story()
    export_encoder(place.encoder)
    encoder = TextEncoder(place.encoder, precision="fp32")
    first_night(place, plan, street, encoder, say)
    story.models.append(learn(place, plan, 0, encoder, say))
    place.experiments.write_text(plan.experiments())
    clock = Clock(plan.midnight(1))
    with application(place, plan, clock) as app:
        for trial in plan.trials:
            story.power[trial.name] = rehearse(app.recommender, clock, street, trial)
            say(story.power[trial.name].words)
        for number in range(1, plan.days + 1):
            day = serve_day(app, clock, street, place, story, number)
            night(app, place, plan, street, number, encoder)
            _watch(place, plan, story, day, encoder, say)
            say(_told(day))
            for line in day.happened:
                say(f"  {line}")
    return story, street


def _watch(place: Place, plan: Plan, story: Story, day: Day, encoder: TextEncoder, say: Say) -> None:
    """Reports of the day that ended, and what is done about them before the next begins."""
    if day.number == plan.drift_day:
        day.happened.append("everybody's taste begins to move (known to the simulator alone)")
    watch_experiments(place, plan, story, day)
    day.drift = watch_drift(place, plan, day.number)
    if day.drift.severe:
        told = "; ".join(day.drift.severe[:2]) + ("; …" if len(day.drift.severe) > 2 else "")
        _train(place, plan, story, day, encoder, f"severe drift alarm ({told})", say)
    elif day.number == plan.training_day:
        _train(place, plan, story, day, encoder, "as every month, whatever drifted", say)
    if day.number == plan.rollback_day - 1:
        _roll_back(place, day, None)
    elif day.number == plan.rollback_day:
        newest = [model.version for model in story.models if model.passed]
        _roll_back(place, day, newest[-1] if newest else None, again=True)


def _train(place: Place, plan: Plan, story: Story, day: Day, encoder: TextEncoder, why: str, say: Say) -> None:
    """Train on all that is known, and release what passes; unless one has been trained lately, or the month is at its end."""
    if story.models[-1].day and day.number < story.models[-1].day + REST_DAYS:
        return
    if day.number > plan.days - LEFT_DAYS:
        return
    day.happened.append(f"{why}: a new model is trained")
    say(f"day {day.number}: {why}: a new model is trained")
    made = learn(place, plan, day.number, encoder, say)
    story.models.append(made)
    day.happened.append(
        f"model {made.version[:8]} released: it passed its gate"
        if made.passed
        else f"model {made.version[:8]} did not pass its gate: the one before goes on"
    )


def _roll_back(place: Place, day: Day, version: str | None, *, again: bool = False) -> None:
    """Let the model before serve, or with `again` the newest, as `make rollback` does it."""
    with place.connect() as connection:
        passed = connection.execute("SELECT count(*) FROM gate_records WHERE passed").fetchone() or (0,)
        if passed[0] < 2 or (again and version is None):
            if not again:
                day.happened.append("no roll-back: no earlier model passed its gate")
            return
        was, now = roll_back_model(connection, place.artifacts_url, version)
    day.happened.append(
        f"{'forward again' if again else 'rolled back'}: model {now[:8]} serves from tomorrow instead of {was[:8]}"
    )


def _told(day: Day) -> str:
    return (
        f"day {day.number} ({day.date}): {day.visits} lists, click rate {day.click_rate:.3f} (true {day.true_click_rate:.3f}), "
        f"relevance {day.relevance:.2f} of {day.best:.2f} possible, popular {day.popular:.2f}; p99 {day.p99_ms:.0f} ms"
    )
