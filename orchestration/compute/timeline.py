"""Windows at any instant by two look-ups: a view's events in the order in which they could be seen, with running totals.

A window `[floor_day(t) − w days, t)` begins at a midnight. Events that were learned of on the day they happened are sorted
by key and by when they could first be seen: a window is a run of rows, and what adds up over it is the difference of two
running totals. Events learned of on a later day are matched with the labels that could see them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestration.compute.exact import MICRO, summable
from orchestration.compute.order import Ints, Order, changes
from schemas.features import FeatureView, Merge, State

DAY = 86_400_000_000
"""Microseconds."""
_PAIRS = 1_000_000
"""So many pairs of a late event and a label that could see it are held at once."""
_THREADS = 2
"""So many states are made ready at once, and so are as many copies of a state's column."""
_STEPS = 16
"""How many rows of a recurrence are computed one after the other; longer ones side by side."""

Floats = NDArray[np.float64]
Part = NDArray[Any]
Variants = NDArray[np.integer]


class Timeline:
    """The events of one view, `n` of them in any order: `key (n,)` numbers from 0, `occurred` and `known (n,)` microseconds.

    `variant (n,)` says which of v variants an event is of, and `parts` what one of each variant gives to each state,
    `(v,)`: bool for what is counted and for instants, masked millionths for sums, float64 with NaN for nothing for the
    rest. To a state that is not among them every event gives the same.
    """

    def __init__(
        self,
        view: FeatureView,
        key: Ints,
        occurred: Ints,
        known: Ints,
        variant: Variants,
        parts: Mapping[str, Part],
    ) -> None:
        self._view = view
        # Memory that is touched for the first time costs more than what is done with it: few arrays, written in place.
        delayed = np.flatnonzero(occurred < known)
        is_late = known[delayed] // DAY > occurred[delayed] // DAY
        late = delayed[is_late]
        # By day, and by when they became known: the first of a day is the one that makes it count.
        late = late[np.lexsort((known[late], occurred[late] // DAY, key[late]))]
        late_day = occurred[late] // DAY
        self._late = _Late(key[late], known[late], late_day)
        # What happens at an instant is seen right after it, never at it.
        visible = occurred + 1
        np.maximum(visible, known, out=visible)
        if len(late):
            prompt = np.delete(np.arange(len(key)), late)
            self._order = Order(key[prompt], visible[prompt])
            rows = prompt[self._order.rows]
        else:
            self._order = Order(key, visible)
            rows = self._order.rows
        first, last = (int(occurred.min()) // DAY, int(visible.max()) // DAY) if len(key) else (0, 0)
        self._first_day, self._midnights = first, self._order.rank(np.arange(first, last + 2) * DAY)
        every = np.ones(int(variant.max()) + 1 if len(variant) else 0, bool)
        here_variant, late_variant = variant[rows], variant[late]
        # What is known of a key's rows in the order in which they happened needs no order of its own.
        here, starts = occurred[rows], self._order.starts
        here_known = known[rows] if len(delayed) else here
        in_order = not len(late) and bool(np.all((here[1:] >= here[:-1]) | starts[1:]))

        def held(state: State) -> _Held:
            part = parts.get(state.name, every)
            match state.merge:
                case Merge.SUM if state.is_count:
                    return _Count(part[here_variant], part[late_variant])
                case Merge.SUM:
                    return _Sum(np.ma.asarray(part), here_variant, late_variant)
                case Merge.DAYS:
                    if len(late) or not part.all():
                        days = self._order.keys * (last - first + 1) + (here // DAY - first)
                        late_days = key[late] * (last - first + 1) + (late_day - first)
                        return _Count(*_days(part[here_variant], days, part[late_variant], late_days))
                    return _Count(starts | changes(here // DAY), part[:0])
                case Merge.DECAY:
                    assert state.half_life_days is not None
                    half_life = state.half_life_days * DAY
                    weights, late_weights = part[here_variant], part[late_variant]
                    return _Decayed(weights, here, here_known, starts, late_weights, occurred[late], half_life)
                case Merge.LAST:
                    values = part[variant]
                    by_value = np.argsort(values, kind="stable")
                    return _Latest(values, by_value, rows, late, occurred, starts)
                case Merge.MAX if state.is_instant and in_order:
                    return _LastRow(part[here_variant], here)
                case Merge.MAX if state.is_instant:
                    every_row = np.arange(len(key))
                    return _Latest(_instants(part[variant], occurred), every_row, rows, late, occurred, starts)
                case _:
                    values = part[variant]
                    values = _instants(values, occurred) if state.is_instant else values
                    return _Best(np.fmin if state.merge is Merge.MIN else np.fmax, values[rows], values[late])

        # NumPy lets go of the interpreter while it sorts, gathers and adds up.
        with ThreadPoolExecutor(_THREADS) as pool:
            self._held: dict[str, _Held] = dict(
                zip((state.name for state in view.states), pool.map(held, view.states), strict=True)
            )

    def read(self, key: Ints, at: Ints) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
        """The view's columns for labels `key (m,)`, `at (m,)` (microseconds), NaN for NULL, and which labels have any event.

        Decayed states are weighed at the midnight that began the label's day. Instants are in seconds.
        """
        # Neighbours are looked up in neighbouring places.
        order, right = self._order.in_order(key, at)
        key, at = key[order], at[order]
        day = at // DAY
        midnight = day * DAY
        lefts = {}
        for days in {days for _, _, days in self._view.columns}:
            edge = np.clip(day - days - self._first_day, 0, len(self._midnights) - 1)
            lefts[days] = self._order.place(key, self._midnights[edge])
        found = {
            name: self._held[state.name].between(lefts[days], right, midnight)
            for name, state, days in self._view.columns
        }
        present = right > lefts[self._view.max_window_days]
        for labels, rows in self._late.seen(key, at, self._view.max_window_days):
            present[labels] = True
            age_days = day[labels] - self._late.day[rows]
            for name, state, days in self._view.columns:
                inside = age_days <= days
                self._held[state.name].add(found[name], labels[inside], rows[inside], midnight)
        columns = {}
        for name, state, _ in self._view.columns:
            columns[name] = np.empty(len(at))
            columns[name][order] = np.where(present, self._held[state.name].done(found[name]), np.nan)
        answered = np.empty(len(at), bool)
        answered[order] = present
        return columns, answered


@dataclass(frozen=True, slots=True)
class _Late:
    """The events that were learned of after their day, `(l,)` each, sorted by key and day."""

    key: Ints
    known: Ints
    day: Ints

    def seen(self, key: Ints, at: Ints, days: int) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of a label and a late event that it could see in its longest window: `(labels (p,), rows (p,))`, in pieces."""
        if not len(self.key):
            return
        order = Order(key, at)
        begin = order.place(self.key, order.rank(self.known - 1))
        end = order.place(self.key, order.rank((self.day + days + 1) * DAY - 1))
        count = np.maximum(end - begin, 0)
        total = np.concatenate([[0], np.cumsum(count)])
        for start in range(0, int(total[-1]), _PAIRS):
            pair = np.arange(start, min(start + _PAIRS, int(total[-1])))
            rows = np.searchsorted(total, pair, side="right") - 1
            yield order.rows[begin[rows] + pair - total[rows]], rows


class _Held(Protocol):
    """What is held of one state. `found` is whatever `between` gives; `add` puts late events into it."""

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Any: ...

    def add(self, found: Any, labels: Ints, rows: Ints, midnight: Ints) -> None: ...

    def done(self, found: Any) -> Floats: ...


class _Count:
    def __init__(self, here: Part, late: Part) -> None:
        self._running = _totals(here, np.int32)
        self._late = late

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Ints:
        found: Ints = np.subtract(self._running[right], self._running[left], dtype=np.int64)
        return found

    def add(self, found: Ints, labels: Ints, rows: Ints, midnight: Ints) -> None:
        np.add.at(found, labels, self._late[rows])

    def done(self, found: Ints) -> Floats:
        return found.astype(np.float64)


class _Sum:
    """A sum over no values is none: they are counted beside it."""

    def __init__(self, part: np.ma.MaskedArray[Any, Any], here: Variants, late: Variants) -> None:
        given, whole = ~np.ma.getmaskarray(part), summable(part, np.concatenate([here, late]))
        self._running = _totals(whole[here], whole.dtype)
        self._late = whole[late]
        self._given = _Count(given[here], given[late])

    def between(self, left: Ints, right: Ints, midnight: Ints) -> tuple[Part, Ints]:
        return self._running[right] - self._running[left], self._given.between(left, right, midnight)

    def add(self, found: tuple[Part, Ints], labels: Ints, rows: Ints, midnight: Ints) -> None:
        np.add.at(found[0], labels, self._late[rows])
        self._given.add(found[1], labels, rows, midnight)

    def done(self, found: tuple[Part, Ints]) -> Floats:
        return np.where(found[1] > 0, found[0].astype(np.float64) / MICRO, np.nan)


class _Best:
    """The smallest or the largest: nothing can be taken out of it, so every row of a window is looked at."""

    def __init__(self, best: np.ufunc, here: Floats, late: Floats) -> None:
        self._best, self._here, self._late = best, np.append(here, np.nan), late

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Floats:
        if not len(left):
            return np.zeros(0)
        found: Floats = self._best.reduceat(self._here, np.stack([left, right], 1).ravel())[::2]
        return np.where(left < right, found, np.nan)

    def add(self, found: Floats, labels: Ints, rows: Ints, midnight: Ints) -> None:
        self._best.at(found, labels, self._late[rows])

    def done(self, found: Floats) -> Floats:
        return found


class _Latest:
    """The value of the latest event, and of one instant the one that comes last in `order (n,)`.

    What is before a window happened before everything in it: the latest of all rows up to a window's end is its latest,
    or it has none.
    """

    def __init__(
        self, values: Floats, order: Ints, rows: Ints, late: Ints, occurred: Ints, starts: NDArray[np.bool_]
    ) -> None:
        given = order[~np.isnan(values[order])]
        given = given[_sorted(occurred[given])[1]]
        self._values = np.append(values[given], np.nan)
        rank = np.full(len(values), -1)
        rank[given] = np.arange(len(given))
        here = rank[rows]
        # Each key begins above everything of the one before.
        base = np.cumsum(starts) * (len(given) + 1)
        self._running = np.maximum.accumulate(here + base) - base
        self._place = np.full(len(given) + 1, -1)
        self._place[here] = np.where(here < 0, -1, np.arange(len(rows)))
        self._late = rank[late]

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Ints:
        found = np.full(len(left), -1)
        some = np.flatnonzero(left < right)
        latest = self._running[right[some] - 1]
        found[some] = np.where(self._place[latest] >= left[some], latest, -1)
        return found

    def add(self, found: Ints, labels: Ints, rows: Ints, midnight: Ints) -> None:
        np.maximum.at(found, labels, self._late[rows])

    def done(self, found: Ints) -> Floats:
        return self._values[found]


class _LastRow:
    """When the last row that counts happened, of rows in the order in which they happened and none of them late."""

    def __init__(self, counts: Part, occurred: Ints) -> None:
        self._occurred = occurred
        every = np.arange(len(counts))
        self._running = every if counts.all() else np.maximum.accumulate(np.where(counts, every, -1))

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Ints:
        found = np.full(len(left), -1)
        some = np.flatnonzero(left < right)
        latest = self._running[right[some] - 1]
        found[some] = np.where(latest >= left[some], latest, -1)
        return found

    def add(self, found: Ints, labels: Ints, rows: Ints, midnight: Ints) -> None:
        assert not len(labels)

    def done(self, found: Ints) -> Floats:
        some = np.flatnonzero(found >= 0)
        seconds = np.full(len(found), np.nan)
        seconds[some] = self._occurred[found[some]] / MICRO
        return seconds


class _Decayed:
    """Weights as of each row of everything before it; a window's are those at its end less those from before it began."""

    def __init__(
        self,
        part: Part,
        here: Ints,
        known: Ints,
        starts: NDArray[np.bool_],
        late: Part,
        late_at: Ints,
        half_life: float,
    ) -> None:
        self._half_life, self._starts = half_life, starts
        self._as_of = here if known is here else np.maximum(here, known)
        kept = np.zeros(len(here))
        np.subtract(self._as_of[:-1], self._as_of[1:], out=kept[1:], casting="unsafe")
        kept[starts] = 0
        kept /= half_life
        np.exp2(kept, out=kept)
        kept[starts] = 0
        weights = part.astype(np.float64)
        if known is not here:
            delayed = np.flatnonzero(here < known)
            weights[delayed] *= np.exp2((here[delayed] - known[delayed]) / half_life)
        self._total = recur(weights, kept)
        self._late, self._late_at = late, late_at

    def between(self, left: Ints, right: Ints, midnight: Ints) -> Floats:
        many, some = len(left), np.flatnonzero(left < right)
        left, right, midnight = left[some], right[some] - 1, midnight[some]
        # Before a key's first row there is nothing, though there is a row.
        last = np.where(self._starts[left], right, left - 1)
        before = np.where(self._starts[left], 0.0, self._at(last, midnight))
        found = np.zeros(many)
        found[some] = self._at(right, midnight) - before
        return found

    def _at(self, row: Ints, midnight: Ints) -> Floats:
        """The weights, at `midnight`, of everything up to `row` of its key."""
        return self._total[row] * np.exp2((self._as_of[row] - midnight) / self._half_life)

    def add(self, found: Floats, labels: Ints, rows: Ints, midnight: Ints) -> None:
        np.add.at(found, labels, self._late[rows] * np.exp2((self._late_at[rows] - midnight[labels]) / self._half_life))

    def done(self, found: Floats) -> Floats:
        return found


def _totals(parts: Part, dtype: np.dtype[Any] | type[np.int32]) -> Part:
    """`(n + 1,)`: what the first 0, 1, … n of `parts (n,)` add up to."""
    found = np.zeros(len(parts) + 1, dtype)
    np.cumsum(parts, out=found[1:])
    return found


def recur(added: Floats, kept: Floats) -> Floats:
    """`x (n,)` with `x[i] = x[i − 1] · kept[i] + added[i]`: as exact as one by one, in 16 steps.

    All stretches of 16 rows are computed side by side, each as if nothing were before it; what is before it is the same
    recurrence over their ends.
    """
    if not len(added):
        return np.zeros(0)
    x, carried = _side_by_side(added), _side_by_side(kept)
    for step in range(1, _STEPS):
        x[step] += x[step - 1] * carried[step]
        carried[step] *= carried[step - 1]
    if x.shape[1] > 1:
        x[:, 1:] += recur(x[-1], carried[-1])[:-1] * carried[:, 1:]
    return x.T.reshape(-1)[: len(added)]


def _side_by_side(values: Floats) -> Floats:
    """`values (n,)` cut into stretches of `_STEPS` rows: `(_STEPS, ceil(n / _STEPS))`, a stretch a column, 0 after the end."""
    whole, rest = divmod(len(values), _STEPS)
    found = np.empty((_STEPS, whole + (rest > 0)))
    found[:, :whole] = values[: whole * _STEPS].reshape(-1, _STEPS).T
    if rest:
        found[:, whole] = 0
        found[:rest, whole] = values[whole * _STEPS :]
    return found


def _instants(part: Part, occurred: Ints) -> Floats:
    """When each event happened, in seconds, NaN where it does not count."""
    return np.where(part, occurred / MICRO, np.nan)


def _sorted(values: Ints) -> tuple[Ints, Ints]:
    """`values (n,)` in order, and which row each was; equal ones stay as they were."""
    bits, low = len(values).bit_length(), int(values.min(initial=np.iinfo(np.int64).max))
    if len(values) and int(values.max()) - low < np.iinfo(np.int64).max >> bits:
        # Numbers that hold their row are sorted four times as fast as rows by their numbers.
        packed = values - low
        packed <<= bits
        packed |= np.arange(len(values))
        packed.sort()
        rows: Ints = packed & ((1 << bits) - 1)
        packed >>= bits
        packed += low
        return packed, rows
    rows = np.argsort(values, kind="stable")
    return values[rows], rows


def _days(here: Part, here_days: Ints, late: Part, late_days: Ints) -> tuple[Part, Part]:
    """Which event is the first that makes its day count, of those that do, `here (n,)` and `late (l,)`; days hold their key."""

    def firsts(counts: Part, days: Ints) -> Part:
        if counts.all():
            return changes(days)
        counted = np.flatnonzero(counts)
        opens = np.zeros(len(counts), bool)
        opens[counted[changes(days[counted])]] = True
        return opens

    opens = firsts(late, late_days)
    if len(late):
        opens &= ~np.isin(late_days, here_days[here])
    return firsts(here, here_days), opens
