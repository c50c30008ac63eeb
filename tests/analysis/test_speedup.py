"""eta finds a planted speed-up, says so when there is none, and intervals are those of Student's t."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moma.analysis.runs import Run, collect
from moma.analysis.speedup import Curve, curve, eta, held_out, interval, paired, smooth, speedups


def power_law(speed: float, n: int = 200, total: float = 1e15, floor: float = 2.0, noise: float = 0.0) -> Curve:
    flops = total * np.arange(1, n + 1) / n
    rng = np.random.default_rng(int(speed * 100))
    return Curve(flops, floor + (speed * flops / total) ** -0.4 + rng.normal(0, noise, n))


@pytest.mark.parametrize("speed", [1.0, 1.5, 2.0, 3.7])
def test_a_planted_speed_up_is_found(speed: float) -> None:
    found = eta(power_law(1.0), power_law(speed))
    assert found.value == pytest.approx(speed, rel=0.02)
    assert found.gap == pytest.approx(speed**-0.4 - 1.0, abs=0.02)
    noisy = eta(power_law(1.0, noise=0.01), power_law(speed, noise=0.01))
    assert noisy.value == pytest.approx(speed, rel=0.12)


def test_eta_does_not_depend_on_how_often_either_run_logs() -> None:
    assert eta(power_law(1.0, n=100), power_law(2.0, n=377)).value == pytest.approx(2.0, rel=0.02)


def test_a_loss_that_is_never_reached_has_a_gap_but_no_eta() -> None:
    found = eta(power_law(1.0), power_law(1.0, floor=2.5))
    assert found.value is None and found.sparse_flops is None
    assert found.gap == pytest.approx(0.5, abs=1e-6)
    short = Curve(*(values[:100] for values in power_law(1.0)))
    cut = eta(power_law(1.0), short)  # half of the FLOPs: compared where it ends
    assert cut.value is None and cut.gap == pytest.approx(0.0, abs=1e-6)
    assert cut.gap_flops < 0.5e15


def test_smoothing_moves_points_along_a_straight_line() -> None:
    flops = np.arange(1.0, 11.0)
    line = smooth(Curve(flops, 5 - 0.1 * flops), 4.0)
    assert np.allclose(line.loss, 5 - 0.1 * line.flops)
    assert line.flops.tolist() == [1, 1.5, 2, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5]
    assert np.array_equal(smooth(Curve(flops, flops), 0.0).loss, flops)


def test_empty_curves_are_refused() -> None:
    none = Curve(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="got a sparse run without this loss, need a logged curve"):
        eta(power_law(1.0), none)
    with pytest.raises(ValueError, match="got no values, need at least one seed"):
        interval([])


def test_intervals_are_students() -> None:
    found = interval([0.1, 0.2, 0.3])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert not found.excludes(0.0) and interval([0.19, 0.2, 0.21]).excludes(0.0)
    ratio = interval([1.0, 4.0], ratio=True)
    assert ratio.mean == pytest.approx(2.0) and ratio.low is not None and ratio.high is not None
    assert ratio.low * ratio.high == pytest.approx(4.0)
    one = interval([0.5])
    assert (one.mean, one.low, one.high, one.n) == (0.5, None, None, 1) and not one.excludes(0.0)
    assert interval(list(range(40))).n == 40


def with_seeds(runs: list[Run], seeds: int) -> list[Run]:
    """Copies of the runs under further seeds, their losses a little apart."""
    copies = []
    for seed in range(seeds):
        for run in runs:
            meta = {**run.meta, "config": {**run.config, "seed": {"data": seed, "init": seed}}}
            shifted = {
                mode: {name: value + 0.001 * seed * (mode == "aux") for name, value in loss.items()}
                for mode, loss in run.eval["loss"].items()  # type: ignore[index]
            }
            copies.append(replace(run, meta=meta, eval={**run.eval, "loss": shifted}))  # type: ignore[dict-item]
    return copies


def test_held_out_losses_pair_by_seed_and_claim_with_three(study: dict) -> None:
    runs = collect(study["runs"])
    one = held_out(runs)
    assert [row.what for row in one] == ["all targets", "text", "text without structural tokens", "image"] * 3
    causal = ["aux", "aux_calibrated", "threshold"]
    assert list(dict.fromkeys(row.mode for row in one)) == causal  # never the mode that sees the future
    assert one[1].dense == 3.5 and one[1].sparse == pytest.approx(3.36) and one[1].baseline == 4.37
    assert one[0].lower == "moe_4t4i" and one[0].verdict == "one seed: no verdict"
    assert held_out(with_seeds(runs, 2))[0].verdict == "2 seeds: no verdict"
    three = held_out(with_seeds(runs, 3))
    assert {row.verdict for row in three} == {"moe_4t4i is better"} and three[0].difference.n == 3
    wide = with_seeds(runs, 3)
    wide[-1].eval["loss"]["aux"]["loss_text"] += 1.0  # type: ignore[index]
    assert held_out(wide)[1].verdict == "no difference shown"


def test_speed_ups_of_a_study(study: dict) -> None:
    runs = collect(study["runs"])
    found = speedups(runs)
    assert [one.what for one in found] == ["overall", "text", "image"]
    assert all(one.interval is not None and one.interval.mean == pytest.approx(2.0, rel=0.2) for one in found)
    assert held_out(runs[:1]) == [] and speedups(runs[1:]) == []  # nothing to compare with
    assert paired(runs, "moe_4t4i") == [(runs[0], runs[1])]
    assert len(curve(runs[0], "val_loss").flops) == 6
