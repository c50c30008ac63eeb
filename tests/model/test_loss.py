"""The chunked loss against the plain form in float64."""

import pytest
import torch
import torch.nn.functional as F

from moma.modality import IGNORE
from moma.model.loss import linear_cross_entropy

T, D, V = 23, 8, 37


def problem(dtype=torch.float64, n_tokens=T, dim=D, size=V, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, dim, dtype=torch.float64, generator=generator)
    weight = scale * torch.randn(size, dim, dtype=torch.float64, generator=generator)
    target = torch.randint(0, size, (n_tokens,), generator=generator)
    target[::5] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def naive(hidden, weight, target, denominator, z_weight):
    """Cross-entropy and squared log-partition per token (0 without a target), and the objective."""
    logits = hidden @ weight.T
    ce = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    z = torch.where(target == IGNORE, 0, torch.log(torch.exp(logits).sum(1)) ** 2)
    return (ce.sum() + z_weight * z.sum()) / denominator, ce, z


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 23, 1000])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("denominator", [18, 7.5, torch.tensor(18), torch.tensor(7.5)], ids=str)
def test_equals_the_plain_form(chunk_tokens, z_weight, denominator):
    hidden, weight, target = problem()
    expected, ce, z = naive(hidden, weight, target, float(denominator), z_weight)
    need = torch.autograd.grad(expected, [hidden, weight])
    out = linear_cross_entropy(
        hidden, weight, target, denominator=denominator, z_weight=z_weight, chunk_tokens=chunk_tokens
    )
    got = torch.autograd.grad(out.objective, [hidden, weight])
    torch.testing.assert_close(out.objective, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.cross_entropy_T, ce, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.z_T, z, rtol=1e-12, atol=1e-14)
    for g, n in zip(got, need, strict=True):
        torch.testing.assert_close(g, n, rtol=1e-10, atol=1e-14)


def test_gradcheck():
    hidden, weight, target = problem(n_tokens=6, size=5)

    def objective(h, w):
        return linear_cross_entropy(h, w, target, denominator=3.0, z_weight=0.1, chunk_tokens=4).objective

    assert torch.autograd.gradcheck(objective, (hidden, weight))


def test_gradient_scales_with_what_comes_after():
    hidden, weight, target = problem()
    out = linear_cross_entropy(hidden, weight, target, denominator=1.0, z_weight=0.1)
    once = torch.autograd.grad(out.objective, [hidden, weight], retain_graph=True)
    thrice = torch.autograd.grad(3 * out.objective, [hidden, weight])
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_positions_without_target_count_for_nothing():
    hidden, weight, target = problem()
    out = linear_cross_entropy(hidden, weight, target, denominator=1.0, z_weight=0.1)
    (grad,) = torch.autograd.grad(out.objective, hidden)
    silent = target == IGNORE
    assert not out.cross_entropy_T[silent].any() and not out.z_T[silent].any() and not grad[silent].any()
    assert out.cross_entropy_T[~silent].all() and out.z_T[~silent].all()
    none = linear_cross_entropy(hidden, weight, torch.full_like(target, IGNORE), denominator=1.0)
    none.objective.backward()
    assert none.objective == 0 and not hidden.grad.any() and not weight.grad.any()


def test_only_the_objective_carries_a_gradient():
    hidden, weight, target = problem()
    out = linear_cross_entropy(hidden, weight, target, denominator=1.0)
    assert out.objective.requires_grad
    assert not out.cross_entropy_T.requires_grad and not out.z_T.requires_grad


@pytest.mark.parametrize("case", ["no_grad", "nothing_requires_grad"])
def test_no_gradient_is_computed_where_none_is_wanted(case, monkeypatch):
    hidden, weight, target = problem()
    expected = linear_cross_entropy(hidden, weight, target, denominator=2.0, chunk_tokens=5)

    def no_gradient_buffer(*args, **kwargs):
        raise AssertionError("a gradient buffer was made")

    monkeypatch.setattr(torch, "zeros_like", no_gradient_buffer)
    monkeypatch.setattr(torch, "empty_like", no_gradient_buffer)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", no_gradient_buffer)
    if case == "no_grad":
        with torch.no_grad():
            out = linear_cross_entropy(hidden, weight, target, denominator=2.0, chunk_tokens=5)
    else:
        hidden, weight = hidden.detach(), weight.detach()
        out = linear_cross_entropy(hidden, weight, target, denominator=2.0, chunk_tokens=5)
    assert not out.objective.requires_grad
    assert torch.equal(out.objective, expected.objective.detach())
    assert torch.equal(out.cross_entropy_T, expected.cross_entropy_T)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen):
    hidden, weight, target = problem()
    expected = torch.autograd.grad(naive(hidden, weight, target, 2.0, 0.0)[0], [hidden, weight])
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, target, denominator=2.0).objective.backward()
    if frozen == "hidden":
        assert hidden.grad is None
        torch.testing.assert_close(weight.grad, expected[1])
    else:
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, expected[0])


@pytest.mark.parametrize("how", ["compute_dtype", "autocast"])
def test_bf16_matmuls_with_fp32_sums(how):
    hidden, weight, target = problem(torch.float32, n_tokens=300, dim=64, size=500, scale=0.125)
    expected, _, _ = naive(hidden.double(), weight.double(), target, 240.0, 1e-5)
    need = torch.autograd.grad(expected, [hidden, weight])
    kwargs = {"denominator": 240.0, "z_weight": 1e-5, "chunk_tokens": 128}
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_cross_entropy(hidden, weight, target, **kwargs)
    else:
        out = linear_cross_entropy(hidden, weight, target, compute_dtype=torch.bfloat16, **kwargs)
    fp32 = linear_cross_entropy(hidden, weight, target, **kwargs)
    assert out.objective.dtype == out.cross_entropy_T.dtype == torch.float32
    assert 0 < abs(out.objective.double() - expected) <= 1e-3 * expected
    assert abs(fp32.objective.double() - expected) <= 1e-6 * expected
    got = torch.autograd.grad(out.objective, [hidden, weight])
    for g, n in zip(got, need, strict=True):
        assert g.dtype == torch.float32 and (g - n).norm() <= 0.02 * n.norm()


def test_large_logits_do_not_overflow():
    hidden, weight, target = problem(torch.float32, scale=1000.0)
    out = linear_cross_entropy(hidden, weight, target, denominator=1.0, z_weight=1e-5)
    out.objective.backward()
    expected, _, _ = (v for v in naive_stable(hidden.detach().double(), weight.detach().double(), target))
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    torch.testing.assert_close(out.objective.detach().double(), expected, rtol=1e-5, atol=0)


def naive_stable(hidden, weight, target):
    logits = hidden @ weight.T
    ce = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    z = torch.where(target == IGNORE, 0, torch.logsumexp(logits, 1) ** 2)
    return ce.sum() + 1e-5 * z.sum(), ce, z
