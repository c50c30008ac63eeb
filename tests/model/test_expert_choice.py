"""Expert choice against a sort in plain Python."""

from fractions import Fraction

import pytest
import torch

from moma.model.routing import Group
from moma.model.routing.expert_choice import RULE, ExpertChoiceConfig, capacity_share


def choose(logit_NE, capacity_factor, valid_N=None):
    """The rule's decision for one group."""
    config = ExpertChoiceConfig(capacity_factor=capacity_factor)
    share = RULE.share(config, "all", logit_NE.shape[1])
    return RULE.choose(config, logit_NE, Group("all", {}, valid_N, None, share))


def chosen_by_python(scores, k):
    """The k first token numbers in the order (score descending, index ascending), ascending."""
    return sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:k])


@pytest.mark.parametrize("n_tokens", [0, 1, 3, 4, 7, 40])
@pytest.mark.parametrize("n_experts", [2, 4, 7])
@pytest.mark.parametrize("levels", [2, 1000])
def test_exact_form_equals_a_python_sort(n_tokens, n_experts, levels):
    generator = torch.Generator().manual_seed(n_tokens)
    score_NE = torch.randint(0, levels, (n_tokens, n_experts), generator=generator) / levels
    choice = choose(score_NE, 1.0)
    token_EK = choice.token_EK
    assert choice.selected_NE is None and token_EK.dtype == torch.int64
    assert token_EK.shape == (n_experts, n_tokens // n_experts)
    for e in range(n_experts):
        assert token_EK[e].tolist() == chosen_by_python(score_NE[:, e].tolist(), n_tokens // n_experts)


@pytest.mark.parametrize("valid", ["110111011110", "000000000000", "111111111111", "000100000000", "000000011111"])
@pytest.mark.parametrize("capacity_factor", [1.0, 0.5, 1.5, 5.0])
def test_padded_form_ranks_the_valid_tokens_alone(valid, capacity_factor):
    n_experts, n_tokens = 3, len(valid)
    valid_N = torch.tensor([v == "1" for v in valid])
    score_NE = torch.randint(0, 4, (n_tokens, n_experts), generator=torch.Generator().manual_seed(1)) / 4
    choice = choose(score_NE, capacity_factor, valid_N)
    assert choice.token_EK is None and choice.selected_NE is not None
    k = min(int(Fraction(capacity_factor) * int(valid_N.sum()) / n_experts), int(valid_N.sum()))
    for e in range(n_experts):
        held = choice.selected_NE[:, e].nonzero().squeeze(1).tolist()
        scores = [s if v else -1.0 for s, v in zip(score_NE[:, e].tolist(), valid_N.tolist(), strict=True)]
        assert held == chosen_by_python(scores, k)
        assert valid_N[held].all()
    assert choice.selected_NE.sum() <= choice.bound


def test_ties_are_broken_by_index_in_large_groups():
    score_NE = torch.full((5000, 2), 0.5)
    assert torch.equal(choose(score_NE, 1.0).token_EK, torch.arange(2500).expand(2, 2500))


@pytest.mark.parametrize("n_experts", [2, 3, 7, 8])
@pytest.mark.parametrize("capacity_factor", [1.0, 0.1, 0.7, 1.1, 1.25, 9.0])
def test_capacity_is_exact_arithmetic(n_experts, capacity_factor):
    share = capacity_share(capacity_factor, "all", n_experts)
    assert isinstance(share, Fraction)
    for n_tokens in (n_experts, 10 * n_experts, 70 * n_experts):
        exact = min(Fraction(str(capacity_factor)) * n_tokens / n_experts, Fraction(n_tokens))
        token_EK = choose(torch.rand(n_tokens, n_experts), capacity_factor).token_EK
        assert token_EK.shape[1] == int(exact)


def test_capacity_above_every_token_takes_every_token_once():
    assert torch.equal(choose(torch.rand(6, 2), 3.0).token_EK, torch.arange(6).expand(2, 6))


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0])
def test_capacity_factor_must_be_positive(capacity_factor):
    with pytest.raises(ValueError, match="need a number above 0: 1.0 matches dense FLOPs"):
        ExpertChoiceConfig(capacity_factor=capacity_factor)


def test_selection_carries_no_gradient():
    score_NE = torch.rand(6, 2, requires_grad=True)
    choice = choose(score_NE, 1.0)
    assert not choice.token_EK.requires_grad and choice.gate_NE.requires_grad
    assert not choice.observed["cutoff"].requires_grad


@pytest.mark.parametrize("padding", [0, 3])
def test_observed_cutoffs_lie_between_what_is_taken_and_what_is_left(padding):
    logit_NE = torch.randn(24 + padding, 3, generator=torch.Generator().manual_seed(0))
    valid_N = torch.arange(24 + padding) < 24
    cutoff_E = choose(logit_NE, 1.0, valid_N if padding else None).observed["cutoff"]
    for e in range(3):
        best = sorted(logit_NE[:24, e].tolist(), reverse=True)
        assert cutoff_E[e].item() == pytest.approx((best[7] + best[8]) / 2, rel=1e-6)
        assert (logit_NE[:24, e] > cutoff_E[e]).sum() == 8


def test_noise_moves_choice_and_gate_but_not_the_cutoffs():
    generator = torch.Generator().manual_seed(0)
    logit_NE, noise_NE = (torch.randn(40, 4, generator=generator) for _ in range(2))
    share = RULE.share(ExpertChoiceConfig(), "all", 4)
    quiet = choose(logit_NE, 1.0)
    noisy = RULE.choose(ExpertChoiceConfig(), logit_NE, Group("all", {}, None, noise_NE, share))
    assert not torch.equal(noisy.token_EK, quiet.token_EK)
    assert torch.equal(noisy.token_EK, choose(logit_NE + noise_NE, 1.0).token_EK)
    assert torch.equal(noisy.gate_NE, torch.sigmoid(logit_NE + noise_NE))
    assert torch.equal(noisy.observed["cutoff"], quiet.observed["cutoff"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_must_be_a_decay(decay):
    with pytest.raises(ValueError, match="got cutoff_decay=.* need a number in .0, 1.: 0.99 averages about 100 steps"):
        ExpertChoiceConfig(cutoff_decay=decay)
