"""eta in every mode finds what was planted; a run that stopped early, or one seed, never gives a verdict."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moma.analysis.efficiency import Efficiency, efficiencies, end_points, slope, tracked
from moma.analysis.runs import read_run
from moma.analysis.speedup import Curve
from moma.analysis.study import Study, final_flops, read_study

SPARSE = {"text": 4, "image": 4}


def power_law(speed: float, n: int = 200, floor: float = 2.0) -> Curve:
    flops = np.linspace(1 / n, 1.0, n) * 1e15
    return Curve(flops, floor + (speed * flops / 1e15 + 0.01) ** -0.35)


@pytest.fixture(scope="module")
def study(sweep: dict) -> Study:
    return read_study([str(sweep["root"] / "*")])


def find(etas: list[Efficiency], size: str, mode: str, what: str = "overall") -> Efficiency:
    (found,) = [one for one in etas if (one.size, one.mode, one.what) == (size, mode, what)]
    return found


def test_the_slope_of_equal_losses_is_one_over_the_planted_speed() -> None:
    for speed in (0.7, 1.0, 2.0, 3.7):
        assert slope(power_law(1.0), power_law(speed)) == pytest.approx(1 / speed, rel=0.03)
        assert slope(power_law(1.0, 40), power_law(speed, 90)) == pytest.approx(1 / speed, rel=0.05)
    assert slope(power_law(1.0), power_law(1.0, floor=9.0)) is None  # no loss in common
    assert slope(power_law(1.0, 2), power_law(1.0)) is None
    assert slope(power_law(1.0), power_law(1e6)) is None


def test_eta_of_a_study_in_both_modes(study: Study) -> None:
    etas = efficiencies(study)
    assert len(etas) == 3 * 3 * 2  # sizes, losses, modes: no routers were trained
    for one in etas:
        assert one.eta is not None and one.eta.n == 3 and one.reached == 3
        assert one.eta.mean == pytest.approx(2.0, rel=0.25) and one.verdict == "less compute than dense"
        assert one.charged is None and one.shown == one.eta
        assert one.slope is not None and 1 / one.slope.mean == pytest.approx(2.0, rel=0.25)
        assert one.per_second is not None and one.per_second.mean == pytest.approx(one.eta.mean * 3500 / 4000)
        assert [pair.seed for pair in one.pairs] == [(0, 0), (1, 1), (2, 2)]
    train, causal = find(etas, "256×6", "train"), find(etas, "256×6", "causal")
    assert (train.rule, causal.rule) == ("training rule", "moving cut-offs")
    assert causal.eta.mean < train.eta.mean  # type: ignore[union-attr]  # the cut-offs lose 0.02 nats


def test_a_causal_curve_is_that_of_moving_cut_offs_where_the_rule_sees_the_future(study: Study) -> None:
    dense, sparse = study.sizes["128×4"][0], study.sizes["128×4"][3]
    assert tracked(dense, "text")[0].loss[-1] == dense.metrics["val_loss_text"][-1]
    assert tracked(sparse, "text")[0].loss[-1] == sparse.metrics["val_threshold_loss_text"][-1]
    for experts, rule, sees in (({"text": 1, "image": 1}, "expert_choice", False), (SPARSE, "token_choice", False),
                                ({"text": [4, 2], "image": 1}, "expert_choice", True)):  # fmt: skip
        ffn = {"kind": "sparse", "experts": experts, "selection": {"kind": rule}}
        one = replace(sparse, meta={"config": {**sparse.config, "feed_forward": ffn}})
        assert one.sees_future == sees and tracked(one, "text")[1] == ("moving cut-offs" if sees else "its own rule")
    assert replace(dense, meta={"config": {**dense.config, "depth": {"kind": "mod"}}}).sees_future


def test_fewer_than_three_seeds_give_no_verdict(study: Study) -> None:
    def only(n: int) -> Efficiency:
        sizes = {size: [run for run in runs if run.seed[0] < n] for size, runs in study.sizes.items()}
        return efficiencies(replace(study, sizes=sizes))[0]

    assert only(2).verdict == "2 seeds: no verdict" and only(2).eta.low is not None  # type: ignore[union-attr]
    assert only(1).verdict == "one seed: no verdict" and only(1).eta.low is None  # type: ignore[union-attr]


def test_a_model_that_is_worse_says_so(study: Study) -> None:
    def worse(by: float) -> Efficiency:
        runs = [
            run if run.is_dense else replace(run, metrics={**run.metrics, "loss": run.metrics["loss"] + by})
            for run in study.sizes["128×4"]
        ]
        return find(efficiencies(replace(study, sizes={"128×4": runs})), "128×4", "train")

    never = worse(0.5)
    assert never.eta is None and never.reached == 0 and never.verdict == "not as low as dense"
    same = worse(float(-find(efficiencies(study), "128×4", "train").gap.mean))
    assert same.verdict == "no difference shown"


@pytest.fixture
def with_routers(sweep: dict, tmp_path: Path) -> Study:
    """One size, three seeds, auxiliary routers trained and everything evaluated."""
    folders = []
    for seed in range(3):
        for name in ("dense", "moe_4t4i"):
            folder = tmp_path / f"128x4-{name}-s{seed}"
            shutil.copytree(sweep["root"] / folder.name, folder)
            folders.append(folder)
        aux = sweep["write_run"](
            tmp_path / f"aux-s{seed}", SPARSE, seed, 6, 0, "aux_routers", folder, shape=(128, 4), cost=1e7
        )
        sweep["write_eval"](folders[-2], folders[-2], None, 1, seed)
        sweep["write_eval"](aux, aux, SPARSE, 1, seed)
        folders.append(aux)
    return read_study(folders)


def test_what_training_the_routers_cost_is_charged_to_the_sparse_side(with_routers: Study) -> None:
    etas = efficiencies(with_routers)
    train, causal = find(etas, "128×4", "train"), find(etas, "128×4", "causal")
    assert train.charged is None
    sparse = with_routers.runs[3]
    routers = final_flops(sparse.routers)  # type: ignore[arg-type]
    assert routers == pytest.approx(0.2 * final_flops(sparse))  # 6 lines of 30
    for pair in causal.pairs:
        assert pair.routers == routers
        assert pair.charged == pytest.approx(pair.eta.dense_flops / (pair.eta.sparse_flops + routers))
    assert causal.shown == causal.charged and causal.charged.mean < causal.eta.mean  # type: ignore[union-attr]
    moved = find(etas, "128×4", "aux, estimated")  # eval.json: aux loses 0.05 nats more than the cut-offs
    assert moved.rule == "auxiliary routers" and moved.charged.mean < causal.charged.mean  # type: ignore[union-attr]
    assert moved.gap.mean == pytest.approx(causal.gap.mean + 0.05)


def test_end_points_are_bounds_where_dense_never_gets_as_low(with_routers: Study) -> None:
    found = {(one.mode, one.what): one for one in end_points(with_routers)}
    assert {mode for mode, _ in found} == {"aux", "aux_calibrated", "threshold"}
    one = found["aux", "text"]
    assert one.bounds == 3 and one.value.mean == pytest.approx(1 / 1.2) and one.difference.mean == pytest.approx(-0.14)
    assert found["threshold", "text"].value.mean == pytest.approx(1.0)  # cut-offs need no routers
    for run in with_routers.runs:
        if run.eval and "aux" in run.eval["loss"]:
            run.eval["loss"]["aux"]["loss_text"] += 0.24  # now 0.1 nats above dense
    worse = {(one.mode, one.what): one for one in end_points(with_routers)}["aux", "text"]
    assert worse.bounds == 0 and worse.value.mean < 1 / 1.2 and worse.difference.mean == pytest.approx(0.1)


def test_a_stopped_run_gives_no_eta(sweep: dict, tmp_path: Path) -> None:
    for name in ("dense", "moe_4t4i"):
        shutil.copytree(sweep["root"] / f"128x4-{name}-s0", tmp_path / name)
    meta = next((tmp_path / "moe_4t4i").glob("checkpoints/*/meta.json"))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"total_steps": 10**6}))
    study = read_study([tmp_path / "dense", tmp_path / "moe_4t4i"])
    assert efficiencies(study) == [] and len(study.left_out) == 1
    assert read_run(tmp_path / "moe_4t4i").unfinished == "stopped at step 300 of 1000000: run its command again"
