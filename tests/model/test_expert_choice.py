"""`select` against a sort in plain Python."""

from fractions import Fraction

import pytest
import torch

from moma.model.routing.expert_choice import ExpertChoiceConfig, capacity_share, select


def chosen_by_python(scores, k):
    """The k first token numbers in the order (score descending, index ascending), ascending."""
    return sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:k])


@pytest.mark.parametrize("n_tokens", [0, 1, 3, 4, 7, 40])
@pytest.mark.parametrize("n_experts", [2, 4, 7])
@pytest.mark.parametrize("levels", [2, 1000])
def test_exact_form_equals_a_python_sort(n_tokens, n_experts, levels):
    generator = torch.Generator().manual_seed(n_tokens)
    score_NE = torch.randint(0, levels, (n_tokens, n_experts), generator=generator) / levels
    token_EK, keep_EK = select(score_NE, capacity_share(1.0, n_experts), None)
    assert keep_EK is None and token_EK.dtype == torch.int64
    assert token_EK.shape == (n_experts, n_tokens // n_experts)
    for e in range(n_experts):
        assert token_EK[e].tolist() == chosen_by_python(score_NE[:, e].tolist(), n_tokens // n_experts)


@pytest.mark.parametrize("valid", ["110111011110", "000000000000", "111111111111", "000100000000", "000000011111"])
@pytest.mark.parametrize("capacity_factor", [1.0, 0.5, 1.5, 5.0])
def test_padded_form_ranks_the_valid_tokens_alone(valid, capacity_factor):
    n_experts, n_tokens = 3, len(valid)
    valid_N = torch.tensor([v == "1" for v in valid])
    score_NE = torch.randint(0, 4, (n_tokens, n_experts), generator=torch.Generator().manual_seed(1)) / 4
    token_EK, keep_EK = select(score_NE, capacity_share(capacity_factor, n_experts), valid_N)
    assert keep_EK is not None
    k = min(int(Fraction(capacity_factor) * int(valid_N.sum()) / n_experts), int(valid_N.sum()))
    for e in range(n_experts):
        held = token_EK[e][keep_EK[e]].tolist()
        scores = [s if v else -1.0 for s, v in zip(score_NE[:, e].tolist(), valid_N.tolist(), strict=True)]
        assert held == chosen_by_python(scores, k)
        assert valid_N[held].all()
        assert keep_EK[e].tolist() == [True] * k + [False] * (token_EK.shape[1] - k)


def test_ties_are_broken_by_index_in_large_groups():
    score_NE = torch.full((5000, 2), 0.5)
    token_EK, _ = select(score_NE, capacity_share(1.0, 2), None)
    assert torch.equal(token_EK, torch.arange(2500).expand(2, 2500))


@pytest.mark.parametrize("n_experts", [2, 3, 7, 8])
@pytest.mark.parametrize("capacity_factor", [1.0, 0.1, 0.7, 1.1, 1.25, 9.0])
def test_capacity_is_exact_arithmetic(n_experts, capacity_factor):
    share = capacity_share(capacity_factor, n_experts)
    assert isinstance(share, Fraction)
    for n_tokens in (n_experts, 10 * n_experts, 70 * n_experts):
        exact = min(Fraction(str(capacity_factor)) * n_tokens / n_experts, Fraction(n_tokens))
        token_EK, _ = select(torch.rand(n_tokens, n_experts), share, None)
        assert token_EK.shape[1] == int(exact)


def test_capacity_above_every_token_takes_every_token_once():
    token_EK, keep_EK = select(torch.rand(6, 2), capacity_share(3.0, 2), None)
    assert torch.equal(token_EK, torch.arange(6).expand(2, 6)) and keep_EK is None


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0])
def test_capacity_factor_must_be_positive(capacity_factor):
    with pytest.raises(ValueError, match="need a number above 0: 1.0 matches dense FLOPs"):
        ExpertChoiceConfig(capacity_factor=capacity_factor)


def test_selection_carries_no_gradient():
    score_NE = torch.rand(6, 2, requires_grad=True)
    token_EK, _ = select(score_NE, capacity_share(1.0, 2), None)
    assert not token_EK.requires_grad
