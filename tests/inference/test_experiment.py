"""Declarations and assignment: what a file may say, every fault at once, and who is in which arm."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from scipy import stats

from inference.declared import Declared
from inference.experiment import (
    MAX_ARMS,
    MAX_EXPERIMENTS,
    Arm,
    Assignment,
    Experiment,
    assign,
    places,
    read_experiments,
    stopped,
    versions,
)
from schemas.errors import DefinitionError

EXAMPLE = Path(__file__).parents[2] / "infra" / "experiments.example.toml"
START = datetime(2026, 1, 1, tzinfo=UTC)
AT = START + timedelta(days=1)
TWO = (Arm("control", 0.5), Arm("treatment", 0.5))
PEOPLE = [f"user-{number:05}" for number in range(20_000)]


def experiment(name: str = "e", arms: tuple[Arm, ...] = TWO, **more: object) -> Experiment:
    return Experiment(name, START, arms, **more)  # type: ignore[arg-type]


def arm_of(experiments: list[Experiment], user_id: str, at: datetime = AT) -> str | None:
    found = assign(experiments, user_id, at)
    return None if found is None else f"{found.experiment.name}/{found.arm.name}"


def declared_at(file: Path) -> tuple[Experiment, ...]:
    found = Declared(str(file)).changed()
    assert found is not None
    return found


def text(arms: str = "[experiments.e.arms.a]\nshare = 1", head: str = "start = 2026-01-01T00:00:00Z") -> str:
    return f"[experiments.e]\n{head}\n{arms}\n"


# --- who is in which arm ----------------------------------------------------------------------------------------------


def test_the_hash_is_what_it_was() -> None:
    """Golden values: another hash, or another key, would deal out everybody anew in the middle of an experiment."""
    assert [places(experiment(), user) for user in ("u", "user-00001", "é\ud800")] == [
        (0.25540540377985665, 0.38431890951206893),
        (0.48078877331774394, 0.973686799798227),
        (0.017276875429172445, 0.5601027139913969),
    ]
    three = experiment("prices", (Arm("a", 0.2), Arm("b", 0.3), Arm("c", 0.5)), salt="s")
    dealt = [(arm_of([three], f"u{n}") or "nobody").removeprefix("prices/") for n in range(40)]
    assert "".join(dealt) == "bcaccaabcabcccbabccbacaaaccbcabababbbcbc"


def test_people_are_dealt_out_by_the_shares_and_stay_where_they_are() -> None:
    arms = (Arm("a", 0.1), Arm("b", 0.25), Arm("shadow", 0.0), Arm("c", 0.65))
    dealt = {user: arm_of([experiment(arms=arms)], user) for user in PEOPLE}
    counted = Counter(dealt.values())
    observed = [counted[f"e/{name}"] for name in "abc"]
    assert stats.chisquare(observed, [len(PEOPLE) * share for share in (0.1, 0.25, 0.65)]).pvalue > 0.001
    assert counted["e/shadow"] == 0
    later = AT + timedelta(days=300)
    assert all(arm_of([experiment(arms=arms)], user, later) == arm for user, arm in dealt.items())


def test_both_numbers_of_a_person_are_uniform_and_say_nothing_of_each_other() -> None:
    taken, place = zip(*(places(experiment(), user) for user in PEOPLE), strict=True)
    for numbers in (taken, place):
        assert stats.kstest(numbers, "uniform").pvalue > 0.001
    assert abs(stats.spearmanr(taken, place).statistic) < 0.03
    other = [places(experiment("f"), user)[1] for user in PEOPLE]
    salted = [places(experiment(salt="2"), user)[1] for user in PEOPLE]
    assert abs(stats.spearmanr(place, other).statistic) < 0.03, "experiments deal independently"
    assert abs(stats.spearmanr(place, salted).statistic) < 0.03, "a salt deals anew"


def test_a_share_that_grows_moves_only_those_that_it_needs() -> None:
    small = experiment(arms=(Arm("control", 0.95), Arm("canary", 0.05)))
    large = experiment(arms=(Arm("control", 0.8), Arm("canary", 0.2)))
    for user in PEOPLE:
        if arm_of([small], user) == "e/canary":
            assert arm_of([large], user) == "e/canary"


def test_experiments_are_tried_in_order_and_one_has_a_person() -> None:
    first, second = experiment("first", traffic=0.3), experiment("second", traffic=0.5)
    counted = Counter((arm_of([first, second], user) or "nobody/").split("/")[0] for user in PEOPLE)
    observed = [counted["first"], counted["second"], counted["nobody"]]
    assert stats.chisquare(observed, [len(PEOPLE) * share for share in (0.3, 0.35, 0.35)]).pvalue > 0.001
    for user in PEOPLE[:500]:
        alone = arm_of([first], user)
        assert arm_of([first, second], user) == (alone or arm_of([second], user))


def test_an_experiment_takes_people_from_its_start_until_before_its_end() -> None:
    end = START + timedelta(days=2)
    short = experiment(end=end)
    tick = timedelta(microseconds=1)
    found = [assign([short], "u", at) is not None for at in (START - tick, START, end - tick, end)]
    assert found == [False, True, True, False]
    assert assign([], "u", AT) is None


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_example_is_read_as_it_is_meant() -> None:
    canary, wording = declared_at(EXAMPLE)
    assert [(arm.name, arm.share) for arm in canary.arms] == [("control", 0.95), ("canary", 0.05), ("next", 0)]
    assert [arm.name for arm in canary.shown] == ["control", "canary"]
    assert [arm.name for arm in canary.shadows] == ["next"]
    assert (canary.traffic, canary.guardrails) == (0.5, ("degraded", "hides"))
    assert wording.start == datetime(2030, 1, 7, 8, tzinfo=UTC)
    assert wording.arms[1] == Arm("third", 0.5, None, "wish.v3", 0.2, 800, 0.02)
    assert [name for name in ("diversity", "model_version") if wording.varies(name)] == ["diversity"]
    assert versions([canary, wording], canary.start) == ("0123456789abcdef", "fedcba9876543210")
    assert versions([canary], datetime(2031, 1, 1, tzinfo=UTC)) == ()
    assert assign([canary, wording], "u", canary.start) in [
        *(Assignment(canary, arm) for arm in canary.shown),
        *(Assignment(wording, arm) for arm in wording.shown),
    ]


def test_nothing_is_declared_where_no_file_is(tmp_path: Path) -> None:
    assert declared_at(tmp_path / "experiments.toml") == ()
    assert read_experiments("# nothing yet\n") == ()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("experiments = 3", "experiments is 3; write tables [experiments.<name>]"),
        ("colour = 1\n" + text(), "'colour' is unknown; the file has tables [experiments.<name>]: remove it"),
        ("[experiments]\ne = 1", "experiments.e is 1; write a table [experiments.e]"),
        ('[experiments."A b"]\nstart = 2026-01-01T00:00:00Z\n[experiments."A b".arms.a]\nshare = 1', "experiment 'A b': call it by small letters"),
        (text('[experiments.e.arms."ä"]\nshare = 1'), "arm 'ä' of experiments.e: call it by small letters"),
        (text(head=""), "experiments.e.start is missing; say when it begins"),
        (text(head='start = "2026-01-01"'), "experiments.e.start is '2026-01-01'; give an instant with its zone and without quotes"),
        (text(head="start = 2026-01-01T00:00:00"), "experiments.e.start is 2026-01-01T00:00:00; give an instant with its zone"),
        (text(head="start = 2026-01-01"), "experiments.e.start is 2026-01-01; give an instant with its zone"),
        (text(head="start = 2026-01-02T00:00:00Z\nend = 2026-01-01T00:00:00Z"), "experiments.e.end is 2026-01-01 00:00:00+00:00, not after its start"),
        (text(head='start = 2026-01-01T00:00:00Z\nunit = "session"'), "experiments.e.unit is 'session'; give \"user\""),
        (text(head="start = 2026-01-01T00:00:00Z\nsalt = 7"), "experiments.e.salt is 7; give a text"),
        (text(head="start = 2026-01-01T00:00:00Z\ntraffic = 0"), "experiments.e.traffic is 0; give a number above 0, at most 1"),
        (text(head="start = 2026-01-01T00:00:00Z\ntraffic = true"), "experiments.e.traffic is True; give a number above 0"),
        (text(head='start = 2026-01-01T00:00:00Z\nmetrics = "clicks"'), "experiments.e.metrics is 'clicks'; give a list"),
        (text(head='start = 2026-01-01T00:00:00Z\nguardrails = ["x", "x"]'), "experiments.e.guardrails is ['x', 'x']; give a list"),
        (text(head="start = 2026-01-01T00:00:00Z\nmetric = 1"), "experiments.e.metric is unknown (did you mean metrics or traffic?): remove or rename it"),
        ("[experiments.e]\nstart = 2026-01-01T00:00:00Z", "experiments.e has no arms; write tables [experiments.e.arms.<arm>]"),
        (text("arms = 1"), "experiments.e has no arms"),
        (text("[experiments.e.arms]\na = 1"), "experiments.e.arms.a is 1; write a table [experiments.e.arms.a]"),
        (text("[experiments.e.arms.a]\ndiversity = 0.5"), "experiments.e.arms.a.share is missing"),
        (text("[experiments.e.arms.a]\nshare = -0.5"), "experiments.e.arms.a.share is -0.5; give a number from 0 to 1"),
        (text("[experiments.e.arms.a]\nshare = nan"), "experiments.e.arms.a.share is nan; give a number from 0 to 1"),
        (text("[experiments.e.arms.a]\nshare = 0.5"), "the shares of experiments.e sum to 0.5; they must sum to 1"),
        (text("[experiments.e.arms.a]\nshare = 0"), "the shares of experiments.e sum to 0;"),
        (text('[experiments.e.arms.a]\nshare = 1\nmodel_version = "../x"'), "experiments.e.arms.a.model_version is '../x'; give a released version, 16 hex digits"),
        (text('[experiments.e.arms.a]\nshare = 1\nwish_template = "wish.v33"'), "experiments.e.arms.a.wish_template is 'wish.v33'; there is no such wish template (did you mean wish.v3"),
        (text('[experiments.e.arms.a]\nshare = 1\nwish_template = "item.v1"'), "experiments.e.arms.a.wish_template is 'item.v1'; there is no such wish template"),
        (text("[experiments.e.arms.a]\nshare = 1\ndiversity = 2"), "experiments.e.arms.a.diversity is 2; give a number from 0 to 1"),
        (text("[experiments.e.arms.a]\nshare = 1\ncandidates = 10.5"), "experiments.e.arms.a.candidates is 10.5; give a whole number from 10 to 1000"),
        (text("[experiments.e.arms.a]\nshare = 1\nexploration = 1.5"), "experiments.e.arms.a.exploration is 1.5; give a number from 0 to 1"),
        (text("[experiments.e.arms.a]\nshare = 1\n[experiments.e.arms.b]\nshare = 0\nexploration = 0.1"), "experiments.e.arms.b.exploration is 0.1 for a shadow"),
        (text("[experiments.e.arms.a]\nshare = 1\nmodel = 'x'"), "experiments.e.arms.a.model is unknown (did you mean model_version?)"),
        (text() + text().replace(".e", ".f"), "experiments.f gets nobody while experiments.e, which stands before it, takes everybody"),
        ("[experiments.e\n", "is no TOML"),
        (text() + text(), "is no TOML"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_name_value_and_way_out(written: str, said: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        read_experiments(written)
    assert said in str(caught.value)


def test_too_much_of_anything_is_a_fault() -> None:
    def arms(count: int, of: str = "e", more: str = "") -> str:
        lines = [f"[experiments.{of}.arms.a{n}]\nshare = {1 if n == 0 else 0}\n{more.format(n)}" for n in range(count)]
        return f"[experiments.{of}]\nstart = 2026-01-01T00:00:00Z\ntraffic = 0.5\n" + "\n".join(lines) + "\n"

    for written, said in (
        ("\n".join(arms(1, f"e{n}") for n in range(MAX_EXPERIMENTS + 1)), "there are 33 experiments; at most 32"),
        (arms(MAX_ARMS + 1), "experiments.e has 17 arms; at most 16"),
        (arms(5, more='model_version = "{0:016x}"'), "the arms name 5 model versions; at most 4 are held in memory"),
    ):
        with pytest.raises(DefinitionError, match=said):
            read_experiments(written)
    read_experiments("\n".join(arms(1, f"e{n}") for n in range(MAX_EXPERIMENTS)))
    read_experiments(arms(MAX_ARMS))
    read_experiments(arms(4, more='model_version = "{0:016x}"'))


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(DefinitionError) as caught:
        read_experiments(
            'x = 1\n[experiments.a]\ncolour = "red"\n[experiments.a.arms.b]\nshare = 3\n'
            "[experiments.c]\nstart = 2026-01-01T00:00:00Z\n[experiments.c.arms.d]\nshare = 0.4\nk = 1\n"
        )
    for said in ("'x' is", "a.colour", "a.start", "a.arms.b.share", "c.arms.d.k"):
        assert said in str(caught.value)


def test_experiments_one_after_the_other_may_each_take_everybody() -> None:
    first = text(head="start = 2026-01-01T00:00:00Z\nend = 2026-02-01T00:00:00Z")
    second = text(head="start = 2026-02-01T00:00:00Z").replace(".e", ".f")
    for one, other in itertools.permutations((first, second)):
        made = list(read_experiments(one + other))
        assert arm_of(made, "u") == "e/a"
        assert arm_of(made, "u", AT + timedelta(days=60)) == "f/a"


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"cannot be read \(Is a directory\); mend its rights, or name another"):
        declared_at(tmp_path)
    (tmp_path / "e.toml").write_bytes(b"\xff")
    with pytest.raises(DefinitionError, match="is not UTF-8"):
        declared_at(tmp_path / "e.toml")


def test_an_experiment_that_was_stopped_is_over_until_its_entry_is_taken_out(tmp_path: Path) -> None:
    file, record = tmp_path / "experiments.toml", tmp_path / "experiments.stopped.json"
    second = text(head="start = 2026-01-01T00:00:00Z\nend = 2026-03-01T00:00:00Z").replace(".e", ".f")
    file.write_text(text(head="start = 2026-01-01T00:00:00Z\ntraffic = 0.999999") + second)
    declared = Declared(str(file))
    assert arm_of(list(declared.changed() or ()), "u") == "e/a"
    assert declared.changed() is None
    record.write_text('{"e": {"stopped_at": "2026-01-01T12:00:00+00:00", "reason": "hides"}}')
    found = list(declared.changed() or ())
    assert [each.end for each in found] == [START + timedelta(hours=12), datetime(2026, 3, 1, tzinfo=UTC)]
    assert arm_of(found, "u", START) == "e/a"
    assert arm_of(found, "u") == "f/a", "people go to what comes after it"
    record.write_text("{}")
    assert arm_of(list(declared.changed() or ()), "u") == "e/a"
    assert stopped(found, '{"f": {"stopped_at": "2027-01-01T00:00:00Z"}}', "r")[1].end == found[1].end
    for broken in ("[]", "no JSON", '{"e": {}}', '{"e": {"stopped_at": "2026-01-01"}}', '{"e": 1}'):
        record.write_text(broken)
        with pytest.raises(
            DefinitionError, match=r"experiments.stopped.json cannot be used .*remove it to start every"
        ):
            declared.changed()
        assert declared.changed() is None


def test_declarations_in_a_bucket_are_read_when_they_changed(s3_bucket: str) -> None:
    import boto3

    bucket, client = s3_bucket.removeprefix("s3://"), boto3.client("s3")
    declared = Declared(f"{s3_bucket}/of/experiments.toml")
    assert (declared.changed(), declared.changed()) == ((), None)
    client.put_object(Bucket=bucket, Key="of/experiments.toml", Body=text().encode())
    found = declared.changed()
    assert found is not None
    assert [each.name for each in found] == ["e"]
    assert declared.changed() is None
    client.put_object(Bucket=bucket, Key="of/experiments.toml", Body=b"broken")
    with pytest.raises(DefinitionError, match=r"s3://.*/of/experiments.toml is no TOML"):
        declared.changed()
    assert declared.changed() is None, "a fault is told once"
    client.delete_object(Bucket=bucket, Key="of/experiments.toml")
    assert declared.changed() == ()


def test_a_bucket_that_does_not_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert Declared("s3://bucket/experiments.toml").changed() is None
