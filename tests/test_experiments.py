"""The paper's studies: every point of every experiment composes, has a folder of its own and the study's FLOPs."""

from functools import cache
from pathlib import Path

import pytest

from moma import describe, sweep
from moma.config import compose, options, points

STUDIES = [name for name in options("experiment") if name not in ("paper", "small")]


@cache
def training(*overrides):
    return compose("train", list(overrides))


@cache
def plan(name):
    """One seed of a small twin: the others differ in nothing else. Each point is composed once for all tests."""
    given = ["seed=0"] if "small" in name else ["data.corpus=corpora/mine", "tokenizer=small"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "compose", lambda verb, own: training(*own))
        return sweep.plan("train", [f"experiment={name}", *given])


@pytest.mark.parametrize("name", STUDIES)
def test_every_point_composes(name):
    jobs = plan(name)
    assert len({job.folder for job in jobs}) == len(jobs) >= (1 if name == "table3_mod" else 2)
    config = training(*jobs[0].overrides).config
    small = "small" in name
    steps = config.duration.to_steps(config.data.tokens_per_step, 1.0, None)
    if small:
        assert config.data.corpus == Path("corpora/emoji") and steps < 1000
    elif not name.startswith("table2"):
        per_step = 4_194_304 if name.startswith("table3") else 8_388_608 if config.data.rows == 8 else 6_291_456
        assert config.data.tokens_per_step == per_step  # Tables 5 and 6
        assert (config.optim.lr, config.optim.end_lr) == (1e-4, 1e-6)
    if name.startswith("fig3") and not small:
        assert steps == (120_000 if config.data.rows == 8 else 160_000)


def test_small_twins_have_three_seeds():
    jobs = points("train", ["experiment=fig4_small"])
    assert len(jobs) == 9
    assert [sum(f"seed={seed}" in job for job in jobs) for seed in (0, 1, 2)] == [3, 3, 3]
    assert training(*jobs[-1]).config.seed.init == 2


def test_both_stages_of_upcycling_come_to_the_steps_of_one_run():
    for seeds, targets, total in (("fig6_seed", "fig6", 120_000), ("fig6_small_seed", "fig6_small", 960)):
        first, second = ([training(*job.overrides).config for job in plan(name)] for name in (seeds, targets))
        assert [a.duration.steps + b.duration.steps for a, b in zip(first, second, strict=True)] == [total] * 2
        assert [a.model for a in first] == [b.model for b in second]
        given = ["seed_run=x"] if targets == "fig6_small" else ["seed_run=x", "data.corpus=c", "tokenizer=small"]
        upcycle = compose("upcycle", [f"experiment={targets}", f"duration.steps={second[1].duration.steps}", *given])
        assert upcycle.config.run_dir == second[1].run_dir and upcycle.config.feed_forward == second[1].feed_forward


def test_the_points_of_a_study_cost_the_same_per_token():
    """Training FLOPs per token with causal attention: within 3 % (Table 1), and the parameters that it prints."""

    def of(name, point):
        job = plan(name)[point]
        choices = training(*job.overrides).choices
        shape = ["data.rows=2", "data.row_length=4096", "data.images=64", "vocab_size=65536", "tokenizer=small"]
        groups = [f"{group}={choices[group]}" for group in ("model", "feed_forward", "depth")]
        return describe.describe(compose("describe", [*groups, *shape]).config)

    dense, sparse, deep = of("fig3", 0), of("fig3", 3), of("fig4", 2)
    assert [round(one["params_total"] / 1e6) for one in (dense, sparse, deep)] == [92, 211, 319]
    costs = [one["flops_per_token_train_causal"] for one in (dense, sparse, deep)]
    assert max(costs) == pytest.approx(min(costs), rel=0.03)
