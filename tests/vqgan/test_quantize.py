import math

import pytest
import torch

from moma.vqgan.quantize import (
    VectorQuantizer,
    code_statistics,
    empty_state,
    nearest_codes,
    update_codebook,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_codes(z, codebook):
    """Plain loops: the first code of smallest distance."""
    codes = []
    for vector in z.tolist():
        distances = [sum((a - b) ** 2 for a, b in zip(vector, code, strict=True)) for code in codebook.tolist()]
        codes.append(distances.index(min(distances)))
    return codes


def quantizer(n_embed=7, dim=3, **options):
    module = VectorQuantizer(n_embed, dim, **options).double()
    with torch.no_grad():
        module.embedding.weight.copy_(random(n_embed, dim, seed=1))
    return module


def test_nearest_codes_equal_plain_loops():
    z, codebook = random(50, 3), random(7, 3, seed=1)
    assert nearest_codes(z, codebook).tolist() == reference_codes(z, codebook)


def test_nearest_codes_in_blocks(monkeypatch):
    z, codebook = random(50, 3), random(7, 3, seed=1)
    whole = nearest_codes(z, codebook)
    monkeypatch.setattr("moma.vqgan.quantize.ROWS", 8)
    assert torch.equal(nearest_codes(z, codebook), whole)


def test_values_and_shapes():
    module, z = quantizer(), random(2, 3, 4, 5)
    result = module(z)
    codes = reference_codes(z.permute(0, 2, 3, 1).reshape(-1, 3), module.embedding.weight)
    assert result.codes.shape == (2, 4, 5) and result.codes.dtype == torch.int64
    assert result.codes.flatten().tolist() == codes
    expected = module.embedding.weight[codes].view(2, 4, 5, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(result.quantized, expected)
    torch.testing.assert_close(module.lookup(result.codes), expected)


def test_straight_through_gradient_is_the_identity():
    module, z = quantizer(), random(2, 3, 4, 5).requires_grad_()
    upstream = random(2, 3, 4, 5, seed=2)
    (gradient,) = torch.autograd.grad((module(z).quantized * upstream).sum(), z)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize(
    "options, commit_weight, book_weight",
    [({"legacy": True}, 1.0, 0.25), ({"legacy": False}, 0.25, 1.0), ({"ema": True}, 0.25, 0.0)],
)
def test_loss_terms_and_their_gradients(options, commit_weight, book_weight):
    module, z = quantizer(**options), random(1, 3, 2, 2).requires_grad_()
    result = module(z)
    gap = z.detach() - module.lookup(result.codes).detach()
    torch.testing.assert_close(result.loss.item(), (commit_weight + book_weight) * gap.square().mean().item())
    result.loss.backward()
    torch.testing.assert_close(z.grad, commit_weight * 2 * gap / gap.numel())
    if book_weight:
        expected = torch.zeros(7, 3, dtype=torch.float64)
        for code, vector in zip(result.codes.flatten().tolist(), gap.permute(0, 2, 3, 1).reshape(-1, 3), strict=True):
            expected[code] -= book_weight * 2 * vector / gap.numel()
        torch.testing.assert_close(module.embedding.weight.grad, expected)
    else:
        assert module.embedding.weight.grad is None


def test_initial_codes_are_small_and_uniform():
    weight = VectorQuantizer(64, 4).embedding.weight
    assert weight.abs().max() <= 1 / 64 and weight.abs().max() > 0.9 / 64


def test_usage_and_perplexity():
    usage, perplexity = code_statistics(torch.tensor([[0, 0, 1], [1, 5, 5]]), 12)
    assert usage.item() == 3 / 12
    assert perplexity.item() == pytest.approx(3.0)
    usage, perplexity = code_statistics(torch.tensor([0, 0, 0, 1]), 2)
    assert perplexity.item() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_ema_equals_plain_loops():
    codebook = random(5, 3, seed=1)
    state = empty_state(codebook)
    count, total, book = [0.0] * 5, [[0.0] * 3 for _ in range(5)], codebook.tolist()
    for step in range(4):
        z = random(20, 3, seed=10 + step)
        codes = nearest_codes(z, codebook)
        assert codes.tolist() == reference_codes(z, torch.tensor(book, dtype=torch.float64))
        for k in range(5):
            mine = [v for v, c in zip(z.tolist(), codes.tolist(), strict=True) if c == k]
            count[k] = 0.9 * count[k] + 0.1 * len(mine)
            total[k] = [0.9 * t + 0.1 * sum(v[i] for v in mine) for i, t in enumerate(total[k])]
            if count[k] > 1e-8:
                book[k] = [t / count[k] for t in total[k]]
        update_codebook(codebook, state, z, codes, decay=0.9)
        torch.testing.assert_close(codebook, torch.tensor(book, dtype=torch.float64))
        torch.testing.assert_close(state.counts, torch.tensor(count, dtype=torch.float64))


def test_a_code_never_seen_keeps_its_vector_without_restarts():
    codebook = torch.tensor([[0.0, 0.0], [100.0, 100.0]], dtype=torch.float64)
    z = random(6, 2)
    update_codebook(codebook, empty_state(codebook), z, nearest_codes(z, codebook), decay=0.9)
    assert codebook[1].tolist() == [100.0, 100.0]
    torch.testing.assert_close(codebook[0], z.mean(0))


def test_the_first_update_with_restarts_draws_the_code_book_from_the_data():
    codebook, z = random(8, 3, seed=1), random(40, 3)
    state = empty_state(codebook)
    update_codebook(
        codebook,
        state,
        z,
        nearest_codes(z, codebook),
        decay=0.999,
        dead_below=0.1,
        generator=torch.Generator().manual_seed(3),
    )
    rows = [next(i for i, v in enumerate(z) if torch.allclose(v, code)) for code in codebook]
    assert len(set(rows)) == 8  # without replacement
    assert state.counts.tolist() == [5.0] * 8  # the mean count 40 / 8


def test_only_dead_codes_restart():
    codebook = torch.tensor([[0.0], [1.0], [50.0]], dtype=torch.float64)
    state = empty_state(codebook)
    state.counts.copy_(torch.tensor([4.0, 4.0, 0.01]))
    state.totals.copy_(state.counts[:, None] * codebook)
    z = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    update_codebook(codebook, state, z, nearest_codes(z, codebook), decay=0.99, dead_below=0.1)
    torch.testing.assert_close(codebook[:2, 0], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert codebook[2, 0] in (0.0, 1.0)


def test_restarts_repeat_vectors_when_there_are_fewer_than_dead_codes():
    codebook, z = random(8, 3, seed=1), random(3, 3)
    update_codebook(codebook, empty_state(codebook), z, nearest_codes(z, codebook), decay=0.9, dead_below=1.0)
    assert all(any(torch.allclose(code, v) for v in z) for code in codebook)


def test_forward_changes_no_state():
    module = quantizer(ema=True)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module.train()(random(2, 3, 4, 4))
    assert module.state_dict().keys() == {"embedding.weight"}
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_bfloat16_input_is_quantised_in_float32():
    module = VectorQuantizer(16, 4, ema=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(torch.randn(1, 4, 2, 2).bfloat16())
    assert result.quantized.dtype == torch.float32 and result.loss.dtype == torch.float32
