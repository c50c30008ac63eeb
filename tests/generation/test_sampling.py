"""Draws on logits against loops over single numbers in float64."""

import math

import pytest
import torch

from moma.generation.sampling import (
    GREEDY,
    Sampling,
    draw,
    greedy,
    guided,
    guided_three_way,
    keep_top_k,
    keep_top_p,
    penalize_repeats,
    row_uniforms,
    sample,
)


def random_logits(seed, rows=6, columns=11, ties=False):
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits * 2).round() if ties else logits * 2


def naive_softmax(row):
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / sum(weights) for w in weights]


def ranked(row):
    return sorted(range(len(row)), key=lambda v: (-row[v], v))


def naive_top_k(row, k):
    kept = set(ranked(row)[:k])
    return [v if i in kept else -math.inf for i, v in enumerate(row)]


def naive_top_p(row, p):
    probabilities, kept, mass = naive_softmax(row), set(), 0.0
    for column in ranked(row):
        if mass >= p:
            break
        kept.add(column)
        mass += probabilities[column]
    return [v if i in kept else -math.inf for i, v in enumerate(row)]


def naive_draw(row, uniform):
    mass = 0.0
    for column, probability in enumerate(naive_softmax(row)):
        mass += probability
        if mass > uniform:
            return column
    raise AssertionError("the last sum is 1")


def naive_penalty(row, seen, penalty):
    return [(v / penalty if v > 0 else v * penalty) if s else v for v, s in zip(row, seen, strict=True)]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k(k, ties):
    logits = random_logits(k, ties=ties)
    assert torch.equal(keep_top_k(logits, k), tensor([naive_top_k(row, k) for row in logits.tolist()]))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p(p, ties):
    logits = random_logits(int(p * 100), ties=ties)
    logits[0, 2:] = -math.inf  # masked columns never come back
    expected = tensor([naive_top_p(row, p) for row in logits.tolist()])
    assert torch.equal(keep_top_p(logits, p), expected)
    assert (expected.isfinite().sum(1) >= 1).all()


def test_repetition_penalty():
    logits, seen = random_logits(1), random_logits(2) > 0
    rows = zip(logits.tolist(), seen.tolist(), strict=True)
    assert torch.equal(penalize_repeats(logits, seen, 1.3), tensor([naive_penalty(v, s, 1.3) for v, s in rows]))


def test_greedy_takes_the_first_of_equals():
    assert greedy(tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-math.inf, -1.0, -2.0]])).tolist() == [1, 0, 1]


def test_guidance_forms():
    none, image, full = (random_logits(seed) for seed in range(3))
    expected = [
        [u + 1.2 * (i - u) + 3.0 * (f - i) for u, i, f in zip(*row, strict=True)]
        for row in zip(none.tolist(), image.tolist(), full.tolist(), strict=True)
    ]
    torch.testing.assert_close(guided_three_way(none, image, full, 1.2, 3.0), tensor(expected), rtol=1e-12, atol=1e-12)
    # equal scales: the image row drops out, and scale 1 is the conditional row itself
    torch.testing.assert_close(guided_three_way(none, image, full, 3.0, 3.0), guided(none, full, 3.0))
    torch.testing.assert_close(guided(none, full, 1.0), full, rtol=1e-12, atol=1e-12)


def test_draws_are_the_inverse_of_the_cumulative_distribution():
    logits = random_logits(3, rows=200)
    logits[::3, ::2] = -math.inf
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [naive_draw(row, u) for row, u in zip(logits.tolist(), uniform.tolist(), strict=True)]
    assert draw(logits, uniform).tolist() == expected


def test_a_draw_never_takes_a_masked_column():
    logits = tensor([[-math.inf, 0.1, 0.2, 0.3, -math.inf]] * 2)
    assert draw(logits, tensor([0.0, 1 - 2**-53])).tolist() == [1, 3]


def test_draws_have_the_right_frequencies():
    logits = random_logits(4, rows=1, columns=5)
    column = draw(logits.expand(20_000, 5), row_uniforms(0, [0], 20_000)[0])
    share = torch.bincount(column, minlength=5) / 20_000
    torch.testing.assert_close(share.double(), logits.softmax(1)[0], rtol=0, atol=0.012)


def test_the_whole_chain_equals_a_loop():
    logits, seen = random_logits(5, rows=50), random_logits(6, rows=50) > 0
    logits[:, 4] = -math.inf
    uniform = row_uniforms(7, range(50), 1)[:, 0]
    how = Sampling(temperature=0.7, top_k=6, top_p=0.8, repetition_penalty=1.2)
    expected = []
    for row, s, u in zip(logits.tolist(), seen.tolist(), uniform.tolist(), strict=True):
        row = [v / 0.7 for v in naive_penalty(row, s, 1.2)]
        expected.append(naive_draw(naive_top_p(naive_top_k(row, 6), 0.8), u))
    assert sample(logits, uniform, how, seen).tolist() == expected
    first = [ranked(naive_penalty(v, s, 1.0))[0] for v, s in zip(logits.tolist(), seen.tolist(), strict=True)]
    assert sample(logits, uniform, GREEDY, seen).tolist() == first


def test_a_rows_numbers_do_not_depend_on_its_company():
    alone, among = row_uniforms(3, [5], 8), row_uniforms(3, [1, 5, 2], 8)
    assert torch.equal(alone[0], among[1])
    assert torch.equal(row_uniforms(3, [5], 4)[0], alone[0, :4])
    assert not torch.equal(among[0], among[1]) and not torch.equal(row_uniforms(4, [5], 8), alone)
    assert row_uniforms(0, [], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -1.0}, r"got temperature=-1.0, need 0 \(greedy\) or more: 1 is the model's own"),
        ({"temperature": math.nan}, "got temperature=nan"),
        ({"top_k": -1}, r"got top_k=-1, need 0 \(off\) or more: change top_k"),
        ({"top_p": 0.0}, r"got top_p=0.0, need above 0 and at most 1 \(off\): change top_p"),
        ({"repetition_penalty": 0.0}, "got repetition_penalty=0.0, need above 0: 1 is off"),
    ],
)
def test_bad_settings(fields, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**fields)
