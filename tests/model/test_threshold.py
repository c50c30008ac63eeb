"""Expert threshold: the rule, its warm-up, its bound, and loads under moving cut-offs."""

from fractions import Fraction

import pytest
import torch

from moma.model.routing import Group
from moma.model.routing.noise import gumbel_sigmoid_noise
from moma.model.routing.threshold import RULE, ThresholdConfig


def state_of(cutoff, age):
    both = {"cutoff": torch.tensor(cutoff), "noisy_cutoff": torch.tensor(cutoff)}
    return {**both, "age": torch.full((len(cutoff),), float(age))}


def choose(config, logit_NE, state, valid_N=None, noise_NE=None):
    share = RULE.share(config, "all", logit_NE.shape[1])
    return RULE.choose(config, logit_NE, Group("all", state, valid_N, noise_NE, share))


def test_above_the_cutoff_is_chosen_by_each_token_alone():
    config = ThresholdConfig(warmup_steps=3, bound=4.0)
    logit_NE = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    state = state_of([0.1, 0.5, 1.0, 9.0], age=3)
    choice = choose(config, logit_NE, state)
    assert torch.equal(choice.selected_NE, logit_NE > state["cutoff"])
    assert torch.equal(RULE.alone(config, logit_NE, state), choice.selected_NE)
    assert torch.equal(choice.gate_NE, torch.sigmoid(logit_NE)) and not choice.dropped_NE.any()
    some = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:7]
    assert torch.equal(RULE.alone(config, logit_NE[some], state), choice.selected_NE[some])


def test_warm_up_is_expert_choice():
    logit_NE = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    choice = choose(ThresholdConfig(warmup_steps=3), logit_NE, state_of([0.0] * 4, age=2))
    for e in range(4):
        best = sorted(range(50), key=lambda t, e=e: (-logit_NE[t, e].item(), t))[:12]
        assert choice.selected_NE[:, e].nonzero().squeeze(1).tolist() == sorted(best)


def test_beyond_the_bound_the_later_tokens_are_dropped():
    config = ThresholdConfig(warmup_steps=1, bound=1.5)
    logit_NE = torch.ones(40, 4)
    choice = choose(config, logit_NE, state_of([0.0, 0.0, 0.0, 2.0], age=5))
    assert choice.selected_NE[:15, :3].all() and not choice.selected_NE[15:].any()
    assert choice.dropped_NE[15:, :3].all() and choice.dropped_NE.sum() == 75
    assert choice.bound == 60 and RULE.alone(config, logit_NE, state_of([0.0] * 4, 5)).all()
    changed_NE = logit_NE.clone()
    changed_NE[20:] = -9.0  # later tokens never change what earlier ones get
    assert torch.equal(
        choose(config, changed_NE, state_of([0.0] * 4, 5)).selected_NE[:20, :3], choice.selected_NE[:20, :3]
    )


def test_padding_is_never_chosen():
    logit_NE, valid_N = torch.ones(6, 2), torch.tensor([True, False, True, True, False, True])
    for age in (0, 9):
        choice = choose(ThresholdConfig(warmup_steps=5), logit_NE, state_of([0.0, 0.0], age), valid_N)
        assert not choice.selected_NE[~valid_N].any() and choice.selected_NE.any()
        assert not choice.dropped_NE[~valid_N].any()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
def test_moving_cutoffs_balance_the_loads(capacity_factor, noise):
    """Logits of a changing distribution: after the warm-up every expert's load stays near its share, with noise on the
    logits too, and so does that of causal inference, which has none."""
    config = ThresholdConfig(capacity_factor=capacity_factor, cutoff_decay=0.9, warmup_steps=20, bound=4.0)
    generator, state, loads = torch.Generator().manual_seed(0), state_of([0.0] * 4, 0), []
    for step in range(200):
        logit_NE = torch.randn(200, 4, generator=generator) * (1 + step / 200) + torch.arange(4.0) - step / 100
        noise_NE = gumbel_sigmoid_noise(str(step), 200, 4, "cpu") if noise else None
        choice = choose(config, logit_NE, state, None, noise_NE)
        alone_NE = RULE.alone(config, logit_NE, state)
        state = RULE.update(config, state, choice.observed)
        loads.append(torch.stack([choice.selected_NE.double().mean(0), alone_NE.double().mean(0)]))
    mean_2E = torch.stack(loads[20:]).mean(0)
    torch.testing.assert_close(mean_2E, torch.full((2, 4), capacity_factor / 4).double(), rtol=0.1, atol=0)


def test_share_is_that_of_expert_choice():
    assert RULE.share(ThresholdConfig(capacity_factor={"text": 2.0}), "text", 4) == Fraction(1, 2)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"warmup_steps": 0}, "got warmup_steps=0, need at least 1 for a first cut-off: raise it"),
        ({"bound": 0.9}, "got bound=0.9, need at least 1: below it the expected load does not fit"),
        ({"capacity_factor": 0.0}, "need a number above 0"),
        ({"cutoff_decay": 1.0}, "need a number in"),
    ],
)
def test_bad_settings_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ThresholdConfig(**fields)
