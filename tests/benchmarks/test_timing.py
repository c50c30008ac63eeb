"""Turns, ratios of one round, noise and goals, on a clock that says what it is told."""

import gc
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch

from moma.benchmarks.timing import (
    Absent,
    Bench,
    Case,
    Goal,
    Noise,
    in_turn,
    judge,
    measure,
    noise,
    quartiles,
    ratios,
    stopwatch,
)

CPU = torch.device("cpu")


def case(name, *seconds, **options):
    """A case whose repetitions take these seconds, over and over; the fake clock reads what a run returns."""
    times = cycle(seconds)
    return Case(name, lambda: next(times), **options)


def bench(*cases, twin=None, absent=(), goals=()):
    return Bench(list(cases), "base", twin or case("base again", 2.0), list(absent), {}, list(goals))


def measured(suite, rounds=4, **options):
    return measure(suite, rounds, 1, CPU, clock=lambda run: run(), **options)


def test_every_case_follows_others_as_the_rounds_turn():
    order = [case(name, 1.0) for name in "ABC"]
    turns = ["".join(each.name for each in in_turn(order, number)) for number in range(6)]
    assert turns == ["ABC", "ACB", "CAB", "CBA", "BCA", "BAC"]


def test_a_ratio_is_of_the_same_round():
    suite = bench(case("base", 1.0, 10.0), case("other", 20.0, 2.0))  # the warm-up takes the first one of each
    readings, _ = measured(suite)
    other = next(each for each in readings if each.name == "other")
    assert other.times_s == [2.0, 20.0, 2.0, 20.0]
    assert (other.ratio, other.ratio_low, other.ratio_high) == pytest.approx((10.1, 0.2, 20.0))
    assert [each.name for each in readings] == ["base", "other", "base again"]


def test_quartiles_and_the_pairs_of_rounds():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_rates_and_shares_of_the_ceiling_are_at_the_median():
    suite = bench(
        case("base", 2.0, flops=100.0, tokens=10),
        case("copying", 4.0, bytes=8.0),
        case("reading", 4.0, bytes=8.0, ceiling="read", memory=lambda: 7),
    )
    readings, _ = measured(suite, ceilings={"gemm": 200.0, "copy": 4.0, "read": 8.0})
    base, copying, reading, _ = readings
    assert (base.flops_per_s, base.tokens_per_s, base.ceiling_share) == (50.0, 5.0, 0.25)
    assert (copying.bytes_per_s, copying.ceiling_share, reading.ceiling_share) == (2.0, 0.5, 0.25)
    assert (reading.memory_bytes, base.memory_bytes) == (7, None)
    assert measured(suite)[0][0].ceiling_share is None


@pytest.mark.parametrize("calls", [0, 2])
def test_a_peer_that_raises_is_absent_with_its_reason(calls):
    left = iter([3.0] * calls)

    def run():
        try:
            return next(left)
        except StopIteration:
            raise RuntimeError("no kernel\nfor this") from None

    suite = bench(case("base", 1.0), Case("peer", run, ours=False), absent=[Absent("missing", "not installed")])
    readings, absent = measured(suite)
    assert [each.name for each in readings] == ["base", "base again"]
    assert absent == [Absent("missing", "not installed"), Absent("peer", "RuntimeError: no kernel")]
    assert gc.isenabled()


def test_ours_and_the_baseline_raise():
    def run():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measured(bench(case("base", 1.0), Case("ours", run)))
    with pytest.raises(RuntimeError, match="broken"):
        measured(bench(Case("base", run, ours=False)))


def test_the_collector_waits_while_the_clock_runs():
    seen = []
    suite = bench(Case("base", lambda: seen.append(gc.isenabled()) or 1.0))
    measured(suite)
    assert seen == [True, False, False, False, False] and gc.isenabled()


def test_noise_is_the_twin_against_the_baseline():
    suite = bench(case("base", 1.0), twin=case("base again", 9.0, 1.0, 1.1, 1.2, 1.3))
    found = noise(suite, measured(suite)[0])
    assert (found.median, found.least, found.most) == pytest.approx((1.15, 1.0, 1.3))
    assert found.spread == pytest.approx(found.high - found.low) == pytest.approx(0.15)


QUIET, LOUD = Noise(1.0, 0.98, 1.02, 0.9, 1.1), Noise(1.0, 0.9, 1.1, 0.5, 2.0)


@pytest.mark.parametrize(
    ("goal", "spread", "value", "held"),
    [
        (Goal("P1", "", 1.19, "slow"), QUIET, 1.2, True),  # 1.2 less half of 0.04
        (Goal("P1", "", 1.17, "slow"), QUIET, 1.2, False),
        (Goal("P1", "", 1.15, "slow"), LOUD, 1.2, None),  # holds by the noise alone
        (Goal("P1", "", 1.25, "slow"), LOUD, 1.2, True),
        (Goal("P2", "", 2.03, "base", "twice", at_least=True), QUIET, 2.0, True),  # 2 % of 2
        (Goal("P2", "", 2.05, "base", "twice", at_least=True), QUIET, 2.0, False),
        (Goal("C4", "", 0.50, "slow", of="memory"), QUIET, 0.5, True),
        (Goal("C4", "", 0.49, "slow", of="memory"), QUIET, 0.5, False),  # memory has no noise
        (Goal("H5", "", 10.1, "slow", of="flops", at_least=True), QUIET, 10.0, True),
        (Goal("H6", "", 0.5, "slow", of="ceiling", at_least=True), QUIET, 0.1, False),
        (Goal("H1", "", 5.0, "slow", of="tokens", at_least=True), QUIET, 5.0, True),
        (Goal("C6", "", 1.0, of="value", value=0.9), LOUD, 0.9, True),
        (Goal("P2", "", 1.0, "base", "nobody", at_least=True), QUIET, None, None),
        (Goal("P2", "", 1.0, "twice", of="tokens"), QUIET, None, None),
    ],
)
def test_goals(goal, spread, value, held):
    suite = bench(
        case("base", 1.0, memory=lambda: 8),
        case("slow", 1.2, flops=12.0, tokens=6, memory=lambda: 4),
        case("twice", 2.0),
    )
    readings, _ = measured(suite, ceilings={"gemm": 100.0})
    judged = judge(goal, readings, spread, "base")
    assert judged.held is held
    assert judged.value == (None if value is None else pytest.approx(value))


def test_the_clock_of_the_cpu_counts_seconds():
    assert 0 < stopwatch(CPU)(lambda: sum(range(1000))) < 10


def test_a_case_runs_within_what_it_names_outside_of_the_clock():
    seen = []

    @contextmanager
    def within():
        seen.append("in")
        yield
        seen.append("out")

    def clock(run):
        seen.append("clock")
        return run()

    suite = bench(case("base", 1.0), case("other", 1.0, within=within, memory=lambda: seen.append("memory") or 1))
    measure(suite, 3, 1, CPU, clock=clock)
    assert seen.count("in") == seen.count("out") == 5  # the warm-up, three rounds, the memory
    assert seen[:2] == ["in", "out"] and seen[-3:] == ["in", "memory", "out"]
    entered = [place for place, what in enumerate(seen) if what == "in"][1:-1]
    assert all(seen[place : place + 3] == ["in", "clock", "out"] for place in entered)
