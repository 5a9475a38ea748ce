"""Off-policy estimates: right on average by enumeration of every list, honest about what the log cannot tell."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg
import pytest
from experiment_log import Answer, Outcome, log

from orchestration.compute import off_policy
from orchestration.compute.lake import Lake
from orchestration.compute.off_policy import Logged, NoSupport, difference, evaluate, mean_of, target_steps
from orchestration.compute.off_policy_log import judge_most, judge_shadow, read_explored
from orchestration.compute.reward_model import RewardModel
from tests.experiment_worlds import PLACES, expected_clicks, explored_lists, ranking_world

OLD = np.array([1.0, 0.2, -0.5, 0.0])
NEW = np.array([-0.3, 0.9, 0.4, 0.1])
CLICK = np.array([0.5, 0.3, 0.7, 0.2])


def every_list(k: int) -> tuple[Logged, np.ndarray]:
    """Each list that Plackett-Luce could draw by OLD, with expected clicks as its rewards; and how likely it is."""
    lists = np.array(list(itertools.permutations(range(4), k)))
    weight = np.exp(OLD)[lists]
    left = np.exp(OLD).sum() - np.concatenate([np.zeros((len(lists), 1)), weight.cumsum(1)[:, :-1]], axis=1)
    n = len(lists)
    made = Logged(
        lists,
        weight / left,
        np.ones((n, 4), bool),
        np.tile(OLD, (n, 1)),
        expected_clicks(CLICK[lists]),
        np.arange(n),
    )
    return made, (weight / left).prod(axis=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("assumption", ["cascade", "slate"])
def test_weights_and_doubly_robust_terms_have_the_true_value_as_their_mean(temperature: float, assumption: str) -> None:
    logged, likely = every_list(3)
    steps = target_steps(logged, np.tile(NEW, (len(likely), 1)), temperature)
    weights = np.cumprod(steps.probability / logged.propensities, axis=1)
    if assumption == "slate":
        weights = np.broadcast_to(weights[:, -1:], weights.shape)
    shown = np.exp(NEW / temperature)[logged.shown] if temperature else None
    if shown is None:
        chance = (logged.shown == np.argsort(-NEW)[:3]).all(axis=1).astype(float)
    else:
        before = np.concatenate([np.zeros((len(shown), 1)), shown.cumsum(1)[:, :-1]], axis=1)
        chance = (shown / (np.exp(NEW / temperature).sum() - before)).prod(axis=1)
    truth = chance @ logged.rewards
    assert likely @ (weights * logged.rewards) == pytest.approx(truth)
    # A model that is plainly wrong must not move it.
    columns = np.tile(np.random.default_rng(900).random((1, 4, 2)), (len(likely), 1, 1))
    wrong = RewardModel(columns, np.full((1, 3, 2), 0.4), np.zeros(len(likely), np.int64))
    terms = off_policy._dr_terms(logged, weights, steps, wrong, assumption)  # type: ignore[arg-type]
    assert likely @ terms == pytest.approx(truth)


def test_a_person_counts_once_however_many_lists_they_had() -> None:
    rows = np.repeat(np.random.default_rng(900).random(300), 20)
    once, many = mean_of(rows[::20], np.arange(300)), mean_of(rows, np.repeat(np.arange(300), 20))
    assert many.se == pytest.approx(once.se)
    assert mean_of(rows, np.arange(6_000)).se < once.se / 4


def test_a_candidate_is_judged_on_lists_that_others_saw() -> None:
    truth = ranking_world().truth
    logged, scores = explored_lists(np.random.default_rng((900, 1)), 2_000)
    found = evaluate(logged, scores)
    for estimate in (found.ips, found.snips, found.dr):
        assert abs(estimate.value - truth) < 4 * estimate.se
    assert found.dr.se < found.ips.se
    assert sum(dr.value for _, dr in found.by_place) == pytest.approx(found.dr.value)
    assert sum(snips.value for snips, _ in found.by_place) == pytest.approx(found.snips.value)
    assert found.places == PLACES
    assert "clicks per list of 3" in found.words()
    # The lead over the ranker that was explored is known better than either alone.
    old = evaluate(logged, logged.scores)
    assert difference(found, old).se < np.hypot(found.dr.se, old.dr.se)


def test_what_was_never_shown_cannot_be_judged() -> None:
    logged, scores = explored_lists(np.random.default_rng((900, 2)), 600)
    # A log that never shows the candidate's favourite where it did show it: those lists are taken out.
    favourite = scores.argmax(axis=1)
    shows = (logged.shown[:, 0] == favourite) & (logged.person % 2 == 0)
    kept = ~shows
    thinned = Logged(
        *(getattr(logged, name)[kept] for name in ("shown", "propensities", "there", "scores", "rewards", "person"))
    )
    with pytest.raises(NoSupport, match="could not have been shown"):
        evaluate(thinned, scores[kept])


def test_propensities_that_are_not_what_was_done_are_noticed() -> None:
    logged, scores = explored_lists(np.random.default_rng((900, 3)), 600)
    halved = Logged(logged.shown, logged.propensities / 2, logged.there, logged.scores, logged.rewards, logged.person)
    with pytest.raises(NoSupport, match="no estimate from them holds"):
        evaluate(halved, scores)
    absurd = Logged(logged.shown, logged.propensities * 0, logged.there, logged.scores, logged.rewards, logged.person)
    with pytest.raises(NoSupport, match="outside 0–1"):
        evaluate(absurd, scores)


def test_too_little_is_refused_with_the_way_out() -> None:
    logged, scores = explored_lists(np.random.default_rng((900, 4)), 40)
    with pytest.raises(NoSupport, match="40 people are too few"):
        evaluate(logged, scores)
    logged, scores = explored_lists(np.random.default_rng((900, 5)), 600, places=10)
    with pytest.raises(NoSupport, match=r"judge the first \d places only"):
        evaluate(logged, scores)
    # Which is what is done where nobody says how many.
    best, lead = judge_most(logged, scores)
    assert 1 <= best.places < 10
    assert lead.low < lead.value < lead.high


def test_lists_without_exploration_are_no_log() -> None:
    empty = np.zeros((0, 0))
    nothing = Logged(empty.astype(np.int64), empty, empty.astype(bool), empty, empty, np.zeros(0, np.int64))
    with pytest.raises(NoSupport, match="exploration"):
        evaluate(nothing, empty)


NOW = datetime.now(UTC).replace(microsecond=0)


def test_explored_lists_are_read_with_their_clicks(connection: psycopg.Connection, lake: Lake) -> None:
    at = NOW - timedelta(days=2)
    pool, scores = ["a", "b", "c"], [2.0, 1.0, 0.0]
    explored = {"propensities": [0.6, 0.7], "candidate_ids": pool, "candidate_scores": scores}
    log(
        connection,
        [
            Answer("r1", "u1", at, ["b", "a"], **explored),  # type: ignore[arg-type]
            Answer("r2", "u2", at, ["c"], propensities=[0.1], candidate_ids=pool, candidate_scores=scores),
            Answer("plain", "u1", at, ["a", "b"], candidate_ids=pool, candidate_scores=scores),
            Answer("beyond", "u1", at, ["z"], propensities=[0.1], candidate_ids=pool, candidate_scores=scores),
        ],
        [
            Outcome("e1", "u1", "a", "click", at + timedelta(hours=1), "r1"),
            Outcome("e2", "u1", "a", "like", at + timedelta(hours=2), "r1"),
            Outcome("e3", "u1", "b", "hide", at + timedelta(hours=2), "r1"),
            Outcome("e4", "u9", "c", "click", at + timedelta(hours=2), "r2"),
        ],
    )
    logged, requests, pools = read_explored(connection, lake, NOW - timedelta(days=9), NOW)
    order = [requests.index(name) for name in ("r1", "r2")]
    assert len(requests) == 2
    assert logged.shown[order].tolist() == [[1, 0], [2, -1]]
    assert logged.propensities[order] == pytest.approx(np.array([[0.6, 0.7], [0.1, 1.0]]))
    assert logged.rewards[order].tolist() == [[0, 1], [0, 0]]
    assert logged.scores[order[0]].tolist() == scores
    assert pools[order[0]] == pool
    assert len(set(logged.person)) == 2


def test_a_shadow_is_judged_by_what_it_would_have_shown(connection: psycopg.Connection, lake: Lake) -> None:
    logged, scores = explored_lists(np.random.default_rng((900, 6)), 300)
    names = np.array([f"i{place}" for place in range(logged.scores.shape[1])])
    at = NOW - timedelta(days=1)
    answers, outcomes, shadows = [], [], []
    for row in range(len(logged.person)):
        shown, user = names[logged.shown[row]].tolist(), f"u{logged.person[row]}"
        answers.append(
            Answer(
                f"r{row}", user, at, shown, "control", 1.0, "trial", logged.propensities[row].tolist(), names.tolist(),
                logged.scores[row].tolist(),
            )
        )  # fmt: skip
        shadows.append((f"r{row}", names[np.argsort(-scores[row])[:10]].tolist()))
        outcomes += [
            Outcome(f"e{row}-{place}", user, shown[place], "click", at + timedelta(minutes=5), f"r{row}")
            for place in np.flatnonzero(logged.rewards[row]).tolist()
        ]
    log(connection, answers, outcomes)
    with pytest.raises(NoSupport, match="no explored list"):
        judge_shadow(connection, lake, "trial", "next", NOW - timedelta(days=9), NOW)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS shadow_requests (request_id text, arm text, experiment text NOT NULL, user_id text NOT NULL, "
        "served_at timestamptz NOT NULL, model_version text NOT NULL, item_ids text[] NOT NULL, scores real[] NOT NULL, "
        "candidates integer NOT NULL, sources jsonb NOT NULL, degraded text[] NOT NULL, PRIMARY KEY (request_id, arm))"
    )
    connection.cursor().executemany(
        "INSERT INTO shadow_requests (request_id, arm, experiment, user_id, served_at, model_version, item_ids, scores, candidates, "
        "sources, degraded) VALUES (%s, 'next', 'trial', 'u', %s, 'm2', %s, '{}', 12, '{}', '{}')",
        [(name, at, shown) for name, shown in shadows],
    )
    found, lead = judge_shadow(connection, lake, "trial", "next", NOW - timedelta(days=9), NOW)
    direct, direct_lead = judge_most(logged, scores)
    assert found.places == direct.places
    assert found.dr.value == pytest.approx(direct.dr.value, abs=0.05)
    assert lead.value == pytest.approx(direct_lead.value, abs=0.05)
