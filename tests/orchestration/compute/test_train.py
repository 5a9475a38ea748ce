"""Training repeats by seed, resumes where it stopped, and learns what counts cannot say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.assemble import graph_values
from orchestration.compute.batches import HistoryWindows
from orchestration.compute.co_visitation import popularity
from orchestration.compute.evaluate import SlateFeatures, evaluate, history_inputs, score_popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.mining import SLATE, newest_labels, recent_rows
from orchestration.compute.model import FeatureEncoder
from orchestration.compute.objective import ABSENT, AllItemsSoftmax, Trends
from orchestration.compute.splits import Queries, leave_one_out
from orchestration.compute.train import train
from orchestration.compute.train_config import TrainConfig
from orchestration.compute.trained_ranker import Progress, TrainedRanker
from orchestration.compute.wishes import Wishes
from schemas.errors import DefinitionError, GateError
from schemas.events import KINDS
from schemas.ranker import TEXT_DIM, ZERO_VALUE

ITEMS, CYCLE = 80, 8
QUICK = TrainConfig(epochs=2, validate_every=1, batch_tokens=512)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny products on a busy machine: waiting for a second thread costs more than it saves."""
    torch.set_num_threads(1)


def world(people: int = 60, seed: int = 0) -> Interactions:
    """Everybody walks around one of ten cycles of eight items: the next item is certain, popularity says nothing."""
    generator = np.random.default_rng(seed)
    cycle = generator.integers(0, ITEMS // CYCLE, people)[:, None]
    step = (generator.integers(0, CYCLE, people)[:, None] + np.arange(CYCLE - 1)) % CYCLE
    item = (cycle * CYCLE + step).astype(np.int32)  # (people, 7): nobody meets an item twice
    n = item.size
    return Interactions(
        np.array([f"u{i}" for i in range(people)]),
        np.array([f"i{i}" for i in range(ITEMS)]),
        np.repeat(np.arange(people), CYCLE - 1).astype(np.int32),
        item.ravel(),
        np.arange(n, dtype=np.int64) * 60_000_000,
        np.full(n, KINDS.index("view") + 1),
        np.full(n, np.nan, np.float32),
    )


def texts() -> NDArray[np.float32]:
    vectors = np.random.default_rng(1).standard_normal((ITEMS, TEXT_DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Features:
    """Features that say something of every row and item, at any time."""

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        context = np.stack([rows % 7, rows % 3], axis=1).astype(np.float32)
        features = (candidates[:, :, None] % np.array([2, 3, 5])).astype(np.float32)
        return SlateFeatures(context, np.ones_like(context), features, np.ones_like(features))

    def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        items = (np.arange(ITEMS)[:, None] % np.array([2, 3, 5])).astype(np.float32)
        values = np.tile(items, (len(instants), 1, 1))
        return values, np.ones_like(values)


def wishes() -> Wishes:
    categories = np.arange(ITEMS)[:, None] // CYCLE == np.arange(ITEMS // CYCLE)
    return Wishes(texts()[: ITEMS // CYCLE], categories)


def nothing() -> Queries:
    return newest_labels(world(), QUICK).take(slice(0))


def parameters(trained: TrainedRanker) -> dict[str, torch.Tensor]:
    return {**trained.ranker.state_dict(), **{f"tower.{k}": v for k, v in trained.tower.state_dict().items()}}


def assert_same(one: TrainedRanker, two: TrainedRanker) -> None:
    for name, value in parameters(one).items():
        assert torch.equal(value, parameters(two)[name]), name
    assert one.ranker.shape == two.ranker.shape  # its temperature is fitted


@pytest.fixture(scope="module")
def uninterrupted() -> TrainedRanker:
    return train(world(), texts(), QUICK, features=Features(), wishes=wishes())


def test_a_seed_repeats_a_run(uninterrupted: TrainedRanker) -> None:
    assert_same(train(world(), texts(), QUICK, features=Features(), wishes=wishes()), uninterrupted)
    other = train(world(), texts(), replace(QUICK, seed=1), features=Features(), wishes=wishes())
    assert not np.allclose(other.item_vectors(), uninterrupted.item_vectors())


@pytest.mark.parametrize("stage_and_epoch", [(1, 1), (1, 2), (2, 1)])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    uninterrupted: TrainedRanker, tmp_path: Path, stage_and_epoch: tuple[int, int]
) -> None:
    checkpoint = tmp_path / "ranker.pt"

    def interrupt(progress: Progress) -> None:
        if (progress.stage, progress.epoch) == stage_and_epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            world(), texts(), QUICK, features=Features(), wishes=wishes(), checkpoint=checkpoint, on_progress=interrupt
        )
    again: list[Progress] = []
    said: list[str] = []
    given: dict[str, Any] = {"features": Features(), "wishes": wishes(), "checkpoint": checkpoint}
    resumed = train(world(), texts(), QUICK, **given, on_progress=again.append, say=said.append)
    stage, epoch = stage_and_epoch
    assert said[0] == f"going on after stage {stage}, epoch {epoch}, where it was stopped"
    assert len(again) < len(uninterrupted.progress)
    assert_same(resumed, uninterrupted)
    again.clear()
    repeated = train(world(), texts(), QUICK, **given, on_progress=again.append)
    assert not again
    assert_same(repeated, uninterrupted)


def test_a_run_interrupted_among_slates_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """The first slate epoch moves the retriever, but the slates stay those that stage 1 mined."""

    def run(checkpoint: Path | None, on_progress: Callable[[Progress], None] | None) -> TrainedRanker:
        config = replace(QUICK, slate_epochs=2)
        return train(
            world(),
            texts(),
            config,
            features=Features(),
            wishes=wishes(),
            checkpoint=checkpoint,
            on_progress=on_progress,
        )

    def interrupt(progress: Progress) -> None:
        if (progress.stage, progress.epoch) == (2, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ranker.pt", interrupt)
    again: list[Progress] = []
    assert_same(run(tmp_path / "ranker.pt", again.append), run(None, None))
    assert [(line.stage, line.epoch) for line in again] == [(2, 2)]


class OtherFeatures(Features):
    """As many features as `Features` has, with other values."""

    def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
        known = super().__call__(rows, candidates)
        return replace(known, candidate_features=known.candidate_features + 1)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"interactions": replace(world(), kind=np.full(len(world()), KINDS.index("like") + 1))}, {}),
        ({"interactions": replace(world(), value=np.full(len(world()), 3, np.float32))}, {}),
        ({"interactions": replace(world(), available_at=np.zeros(ITEMS, np.int64))}, {}),
        ({"interactions": replace(world(), user_ids=np.char.add("other ", world().user_ids))}, {}),
        ({"interactions": replace(world(), item_ids=np.char.add("other ", world().item_ids))}, {}),
        ({"text_vectors": -texts()}, {}),
        ({"config": replace(QUICK, learning_rate=1e-3)}, {}),
        ({"features": Features()}, {}),
        ({"features": OtherFeatures()}, {"features": Features()}),
        ({"wishes": None}, {}),
        ({"wishes": replace(wishes(), item_categories=np.roll(wishes().item_categories, 1, axis=0))}, {}),
        ({"validation": nothing()}, {}),
        ({"validation": newest_labels(world(), replace(QUICK, seed=1, validation_labels=10))}, {}),
    ],
)
def test_a_checkpoint_is_continued_by_the_same_run_only(
    tmp_path: Path, change: dict[str, Any], given: dict[str, Any]
) -> None:
    def interrupt(progress: Progress) -> None:
        reached.append((progress.stage, progress.epoch))
        raise KeyboardInterrupt

    same: dict[str, Any] = {
        "interactions": world(),
        "text_vectors": texts(),
        "config": QUICK,
        "features": None,  # they would differ already where other rows validate
        "wishes": wishes(),
        "validation": newest_labels(world(), replace(QUICK, validation_labels=10)),
    } | given
    changed = same | change
    if "interactions" in change:
        changed["validation"] = replace(same["validation"], interactions=change["interactions"])
    reached: list[tuple[int, int]] = []
    for arguments in (same, same, changed):
        with pytest.raises(KeyboardInterrupt):
            train(**arguments, checkpoint=tmp_path / "ranker.pt", on_progress=interrupt)
    assert reached == [(1, 1), (1, 2), (1, 1)]


def test_validation_labels_of_another_table_are_refused() -> None:
    labels = newest_labels(world(), QUICK)
    assert train(world(), texts(), replace(QUICK, epochs=1, slate_epochs=0), validation=labels).validation
    with pytest.raises(DefinitionError, match=r"another table \(420 events\) than training got \(420 events\)"):
        train(world(seed=5), texts(), QUICK, validation=labels)


def test_without_validation_labels_no_figure_is_claimed() -> None:
    assert train(world(), texts(), replace(QUICK, epochs=1), validation=nothing()).validation == {}


def test_a_checkpoint_of_other_data_is_not_continued(uninterrupted: TrainedRanker, tmp_path: Path) -> None:
    checkpoint = tmp_path / "ranker.pt"

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            world(seed=5),
            texts(),
            QUICK,
            features=Features(),
            wishes=wishes(),
            checkpoint=checkpoint,
            on_progress=interrupt,
        )
    assert_same(
        train(world(), texts(), QUICK, features=Features(), wishes=wishes(), checkpoint=checkpoint), uninterrupted
    )


def test_it_learns_an_order_that_popularity_cannot_see() -> None:
    split = leave_one_out(world(people=200))
    trained = train(split.train, texts(), replace(QUICK, epochs=10, learning_rate=8e-3, validate_every=5))
    result = evaluate({"popularity": score_popularity(popularity(split.train)), "ranker": trained.scorer()}, split)
    assert result.row("ranker").ndcg[10] > 0.6
    assert result.row("ranker").ndcg[10] > 2 * result.row("popularity").ndcg[10]


def test_validation_labels_are_not_trained_on() -> None:
    """Whatever the newest items are, the weights before the first validation are the same."""
    events = world()
    newest = np.argsort(events.occurred_at)[-3:]
    config = replace(QUICK, epochs=1, slate_epochs=0, validation_rate=2.5 / len(events))
    changed = replace(events, item=events.item.copy())
    changed.item[newest] = (changed.item[newest] + 1) % ITEMS
    one, two = (train(world_, texts(), config).item_vectors() for world_ in (events, changed))
    np.testing.assert_array_equal(one, two)


def test_stage_1_is_not_taught_what_stage_2_weighs_it_on(tmp_path: Path) -> None:
    """Whatever the newest labels are, stage 1 ends alike; stage 2 sees them."""
    events = world()
    newest = np.argsort(events.occurred_at)[-3:]
    config = replace(QUICK, epochs=1, held_rate=2.5 / len(events), min_item_events=0)
    changed = replace(events, item=events.item.copy())
    changed.item[newest] = (changed.item[newest] + 1) % ITEMS
    ends = []
    for number, (events_, epochs) in enumerate(((events, 1), (changed, 1), (events, 0), (changed, 0))):
        checkpoint = tmp_path / f"{number}.ckpt"

        def stop(progress: Progress) -> None:
            if progress.stage == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(
                events_,
                texts(),
                replace(config, slate_epochs=epochs),
                validation=newest_labels(events_, QUICK).take(slice(0)),
                on_progress=stop,
                checkpoint=checkpoint,
            )
        ends.append(torch.load(checkpoint, weights_only=True)["state"]["modules"]["ranker.user.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[2], ends[3])  # without a stage 2 they are learned


def test_what_everybody_wants_is_solved_for_and_stays_in_stage_1() -> None:
    """Ten items are chosen by everybody, and one feature says which: its weight is there before the first step."""

    class Telling(Features):
        def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            values, mask = super().trends(instants)
            values[..., 0] = np.arange(ITEMS) < 10
            return values, mask

        def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
            known = super().__call__(rows, candidates)
            known.candidate_features[..., 0] = candidates < 10
            return known

    events = world()
    events = replace(events, item=np.where(np.arange(len(events)) % 2 == 0, events.item % 10, events.item))
    one, two = (
        train(events, texts(), replace(QUICK, epochs=epochs, slate_epochs=0), features=Telling(), validation=None)
        .ranker.trend.weight[0]
        .detach()
        for epochs in (1, 2)
    )
    assert torch.equal(one, two)
    assert float(one[0]) > 2 * float(one[1:3].abs().max())


def test_slates_hold_the_positive_first_and_nothing_the_person_had() -> None:
    asked: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []

    class Recorded(Features):
        def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
            asked.append((rows, candidates))
            return super().__call__(rows, candidates)

    events = world()
    train(events, texts(), replace(QUICK, epochs=1), features=Recorded())
    # The first call samples features for their statistics, the second asks for the slates, the last ones validate.
    rows, candidates = asked[1]
    assert candidates.shape[1] == SLATE
    # The rows that a training set of these events holds: what it knows of them need not be asked for again.
    assert np.isin(rows, recent_rows(events)).all()
    np.testing.assert_array_equal(candidates[:, 0], events.item[rows])
    for row, slate in zip(rows, candidates, strict=True):
        before = events.item[(events.user == events.user[row]) & (events.occurred_at < events.occurred_at[row])]
        assert not np.isin(slate[1:], [*before, events.item[row]]).any()
        assert len(np.unique(slate)) == SLATE


def test_no_events_at_all_are_refused() -> None:
    with pytest.raises(DefinitionError, match="no positive event"):
        train(world().take(np.arange(0)), texts(), QUICK)


def test_hides_are_never_predicted() -> None:
    events = replace(world(), kind=np.full(len(world()), KINDS.index("hide") + 1))
    with pytest.raises(DefinitionError, match="no positive event"):
        train(events, texts(), QUICK)


def test_text_vectors_of_another_catalogue_are_refused() -> None:
    with pytest.raises(DefinitionError, match=r"needs \(80, 384\)"):
        train(world(), texts()[:5], QUICK)


def test_a_large_catalogue_learns_from_sampled_negatives() -> None:
    lines: list[Progress] = []
    config = replace(QUICK, all_items_limit=10, epochs=30, learning_rate=8e-3, slate_epochs=0)
    train(world(), texts(), config, on_progress=lines.append)
    assert lines[-1].loss < 0.8 * lines[0].loss


def test_the_fused_softmax_has_the_gradient_of_cross_entropy() -> None:
    torch.manual_seed(0)
    users, items = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for n in (30, 20))
    trend = torch.randn(4, 20).requires_grad_()
    target, when = torch.randint(0, 20, (30,)), torch.randint(0, 4, (30,))
    ours = AllItemsSoftmax.apply(users, items, target, 0.05, trend, when)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    theirs = torch.nn.functional.cross_entropy(users @ items.T / 0.05 + trend[when], target)
    torch.testing.assert_close(ours, theirs)
    wanted = [users, items, trend]
    for mine, reference in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_the_fused_softmax_bears_logits_far_apart() -> None:
    """At a low temperature, beside one item that everybody wants, the others' shares are below what a float holds."""
    torch.manual_seed(0)
    users, items = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for n in (30, 20))
    trend = torch.zeros(2, 20)
    trend[1, 3] = 300.0
    trend.requires_grad_()
    target, when = torch.randint(0, 20, (30,)), torch.arange(30) % 2
    ours = AllItemsSoftmax.apply(users, items, target, 0.005, trend, when)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    theirs = torch.nn.functional.cross_entropy(users @ items.T / 0.005 + trend[when], target)
    torch.testing.assert_close(ours, theirs)
    wanted = [users, items, trend]
    for mine, reference in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def test_a_value_that_is_no_number_counts_as_missing(uninterrupted: TrainedRanker) -> None:
    class Broken(Features):
        def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
            known = super().__call__(rows, candidates)
            known.candidate_features[:, :, 1] = np.nan
            known.context_features[::2, 0] = np.inf
            return known

        def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            values, mask = super().trends(instants)
            values[:, :, 1] = np.nan
            return values, mask

    class Missing(Broken):
        """The same, said by the mask."""

        def __call__(self, rows: NDArray[np.int64], candidates: NDArray[np.int32]) -> SlateFeatures:
            known = super().__call__(rows, candidates)
            known.candidate_mask[:, :, 1] = 0
            known.context_mask[::2, 0] = 0
            return known

        def trends(self, instants: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            values, mask = super().trends(instants)
            mask[:, :, 1] = 0
            return values, mask

    config = replace(QUICK, epochs=1)
    one, two = (train(world(), texts(), config, features=given) for given in (Broken(), Missing()))
    assert_same(one, two)
    assert all(value.isfinite().all() for value in parameters(one).values())


def test_a_training_that_diverges_is_refused() -> None:
    with pytest.raises(GateError, match=r"stage 1, epoch 1, step \d+: the loss is .*lower learning rate"):
        train(world(), texts(), replace(QUICK, learning_rate=1e30), validation=nothing())


def test_text_vectors_with_nan_are_refused() -> None:
    broken = texts()
    broken[7, 3] = np.nan
    with pytest.raises(DefinitionError, match=r"1 items hold NaN or infinity: \['i7'\]"):
        train(world(), broken, QUICK)


def test_a_value_of_zero_is_a_value() -> None:
    assert graph_values(np.array([np.nan, 0, 2, np.inf], np.float32)).tolist() == [
        0,
        pytest.approx(ZERO_VALUE),
        2,
        0,
    ]
    zero = replace(world(), value=np.zeros(len(world()), np.float32))
    history = history_inputs(newest_labels(zero, QUICK))
    assert ((history.values != 0) == (history.mask > 0)).all()


def test_without_gaps_the_clock_says_nothing() -> None:
    slow = replace(world(), occurred_at=world().occurred_at * 50)
    config = replace(QUICK, epochs=1, slate_epochs=0)
    for gaps, same in ((False, True), (True, False)):
        one, two = (train(events, texts(), replace(config, gaps=gaps)).item_vectors() for events in (world(), slow))
        assert np.array_equal(one, two) is same


def test_an_event_is_also_predicted_from_the_last_earlier_second() -> None:
    """One person: rows 0 | 1 2 | 3, of which 1 and 2 share a second."""
    events = world().take(np.arange(4))
    events = replace(events, occurred_at=np.array([0, 10_000_000, 10_500_000, 20_000_000]))
    windows = np.array([[0, 4, 1]])
    target_row = np.array([[0, 1, 2, 3]])  # state 0 is the prompt's, state j follows row j - 1
    place, rows = HistoryWindows(events, 512, 0).predictions(windows, target_row, np.ones((1, 4), bool))
    assert sorted(zip(place.tolist(), rows.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2), (2, 2), (3, 3)]
    # A window that begins within the person's history has no state for what came in its first second.
    later = np.array([[1, 4, 0]])
    counted = np.array([[False, True, True]])
    place, rows = HistoryWindows(events, 512, 0).predictions(later, np.array([[1, 2, 3]]), counted)
    assert sorted(zip(place.tolist(), rows.tolist(), strict=True)) == [(1, 2), (2, 3)]


def test_an_item_takes_part_from_the_day_it_is_there() -> None:
    day = 86_400_000_000
    events = world().take(np.arange(3))  # three different items, on three days
    events = replace(events, occurred_at=np.arange(3) * day, available_at=np.full(ITEMS, np.iinfo(np.int64).min))
    events.available_at[events.item[2]] = 2 * day + 5  # type: ignore[index]  # set in the line above
    trends = Trends(events, FeatureEncoder(3, 4), None, torch.device("cpu"))
    present = trends.present(torch.zeros(3, ITEMS)).numpy() > ABSENT
    assert present[:, events.item[0]].tolist() == [True, True, True]
    assert present[:, events.item[2]].tolist() == [False, False, True]
    assert present.sum() == 7  # an item without any event never takes part
