"""The fit finds planted laws, says why it did not fit, and its interval covers the spread of seeds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moma.analysis import scaling
from moma.analysis.scaling import PowerLaw, families, fit
from moma.analysis.study import Study, read_study

FLOPS = np.geomspace(1e18, 1e21, 5)


@pytest.mark.parametrize(("c", "a", "b"), [(1.7, 1.2, 0.15), (2.0, 0.5, 0.4), (0.5, 3.0, 0.05), (0.0, 2.0, 0.1)])
def test_planted_laws_are_found(c: float, a: float, b: float) -> None:
    loss = PowerLaw(c, a, b, 1e20).loss(FLOPS)
    for n in (3, 4, 5):
        found = fit(FLOPS[:n], loss[:n], 1e20)
        assert found is not None
        assert (found.c, found.a, found.b) == pytest.approx((c, a, b), abs=1e-5)


def test_one_bad_run_among_many_hardly_moves_the_law() -> None:
    flops = np.repeat(FLOPS, 3)
    law = PowerLaw(1.7, 1.2, 0.15, 1e20)
    loss = law.loss(flops) + np.random.default_rng(0).normal(0, 0.003, len(flops))
    loss[4] += 0.5
    found = fit(flops, loss, 1e20)
    assert found is not None
    assert np.abs(found.loss(FLOPS) - law.loss(FLOPS)).max() < 0.01
    plain = fit(flops, loss, 1e20, np.where(np.arange(15) == 4, 1e9, 1.0))  # weights count: a bad run that counts most
    assert plain is not None and abs(plain.loss(flops[4]) - loss[4]) < 0.05


def test_losses_that_do_not_fall_have_no_law() -> None:
    assert fit(FLOPS, np.linspace(3, 4, 5), 1e20) is None
    with pytest.raises(ValueError, match=r"at 2 places, need as many of both at three or more: add sizes"):
        fit(FLOPS[[0, 0, 1]], np.ones(3), 1e20)
    with pytest.raises(ValueError, match=r"got \(5,\) FLOPs and \(3,\) losses"):
        fit(FLOPS, np.ones(3), 1e20)


@pytest.fixture(scope="module")
def study(sweep: dict) -> Study:
    return read_study([str(sweep["root"] / "*")])


def test_families_of_a_study(study: Study, sweep: dict) -> None:
    costs, (a, b) = sweep["sizes"].values(), sweep["law"]
    found = {(one.variant, one.what, one.mode): one for one in families(study)}
    assert found.keys() == set(
        itertools.product(("dense", "moe_4t4i"), ("overall", "text", "image"), ("train", "causal"))
    )
    dense, sparse = found["dense", "overall", "train"], found["moe_4t4i", "overall", "train"]
    assert dense.law is not None and sparse.law is not None and len(dense.points) == 9
    for one in (dense, sparse):  # the planted part, within what noise of 0.01 nats leaves of it
        falls = one.law.loss(one.points[0].flops) - one.law.loss(one.points[-1].flops)  # type: ignore[union-attr]
        assert falls == pytest.approx(a * ((min(costs) / max(costs)) ** -b - 1), abs=0.02)
        assert np.abs(one.residuals).max() < 0.03
        low, high = one.range("b")  # type: ignore[misc]
        assert low < one.law.b < high  # type: ignore[union-attr]
        assert one.remarks == ["3 sizes fix 3 numbers: nothing tests the law"]
        assert sum(weight for _, weight in one.resampled) == pytest.approx(1.0) and len(one.resampled) == 10
        below, above = one.band(np.array([one.points[0].flops]))  # type: ignore[misc]
        assert below[0] <= one.law.loss(one.points[0].flops) <= above[0]  # type: ignore[union-attr]
    assert (sparse.law.loss(FLOPS[:1] / 1e4) < dense.law.loss(FLOPS[:1] / 1e4)).all()


def test_too_few_sizes_say_so(study: Study) -> None:
    sizes = dict(list(study.sizes.items())[:2])
    (one, *_) = families(replace(study, sizes=sizes))
    assert one.law is None and one.remarks == ["2 of 3 sizes: 128×4, 192×4"] and one.range("c") is None
    single = {size: [run for run in runs if run.seed == (0, 0)] for size, runs in study.sizes.items()}
    (one, *_) = families(replace(study, sizes=single))
    assert one.law is not None and one.resampled == () and one.band(FLOPS) is None


def test_six_seeds_are_drawn(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_DRAWS", 10)
    copies = []
    for shift, run in itertools.product(range(2), (run for run in study.runs if run.is_dense)):
        seed = {name: value + 3 * shift for name, value in run.config["seed"].items()}
        copies.append(replace(run, meta={**run.meta, "config": {**run.config, "seed": seed}}))
    sizes = {size: [run for run in copies if run.config["model"] == own[0].config["model"]]
             for size, own in study.sizes.items()}  # fmt: skip
    (one, *_) = families(replace(study, sizes=sizes))
    assert len(one.resampled) == 10 and one.range("b") is not None
