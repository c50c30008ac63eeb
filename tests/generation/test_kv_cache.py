"""Cached decoding in pieces equals one full forward pass of each row alone, in float64."""

import pytest
import torch

from moma.generation.kv_cache import Decoder, build_caches, compute_dtype, for_decoding
from moma.modality import padded_groups
from moma.model.attention import document_mask
from moma.twin import matrices


def whole(model, tokens, vocab, mode):
    """Hidden states (L, D) of one document by one forward pass without caches."""
    ids = torch.tensor([tokens])
    document = torch.zeros_like(ids)
    groups = padded_groups(ids, document == 0, vocab)
    with torch.no_grad():
        return model(ids, torch.arange(len(tokens))[None], document_mask(document), groups, mode)[0][0]


def documents(vocab):
    picture = [
        vocab.boi,
        *range(vocab.image_start + 3, vocab.image_start + 3 + vocab.tokens_per_image),
        vocab.eoi,
    ]
    t = vocab.text_start
    return [
        [vocab.bos, t, t + 5, *picture, t + 9, t + 1, t + 2, t + 3],
        [vocab.bos, *picture, t + 4, t + 5, t + 6],
        [vocab.bos, t + 7, t + 8, t + 9, t + 10, t + 11],
    ]


@pytest.mark.parametrize("cut", [1, 3])
def test_rows_of_different_lengths_fed_in_pieces(variant, make_model, cut):
    """Left padding: every row's last states are those of the row alone, whatever stands beside it."""
    vocab = variant.vocabulary
    model = make_model(variant, aux_routers=True, n_kv_heads=1)
    rows = documents(vocab)
    width = max(map(len, rows))
    tokens = torch.tensor([[vocab.pad] * (width - len(row)) + row for row in rows])
    present = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    decoder = Decoder(model, vocab, len(rows), width + 2, "aux")
    full = [whole(model, row, vocab, "aux") for row in rows]
    first = width - 2 * cut
    stops = [first, first + cut, width]
    with torch.inference_mode():
        for start, stop in zip([0, *stops], stops, strict=False):
            states = decoder.feed(tokens[:, start:stop], present[:, start:stop])
            for row, tokens_of_row in enumerate(rows):
                place = stop - (width - len(tokens_of_row)) - 1
                if place >= 0:
                    torch.testing.assert_close(states[row], full[row][place], rtol=0, atol=1e-10)


def test_absent_tokens_leave_no_trace(variant, make_model):
    """A row that skips slots ends like one that never had them."""
    vocab = variant.vocabulary
    model = make_model(variant, aux_routers=True)
    row = documents(vocab)[0]
    decoder = Decoder(model, vocab, 1, 2 * len(row), "aux")
    expected = whole(model, row, vocab, "aux")
    with torch.inference_mode():
        for place, token in enumerate(row):
            states = decoder.feed(torch.tensor([[token]]), torch.tensor([[True]]))
            torch.testing.assert_close(states[0], expected[place], rtol=0, atol=1e-10)
            decoder.feed(torch.tensor([[vocab.text_start + 12]]), torch.tensor([[False]]))


def test_a_restart_forgets_the_past(variant, make_model):
    vocab = variant.vocabulary
    model = make_model(variant, aux_routers=True)
    one, two, three = documents(vocab)
    decoder = Decoder(model, vocab, 2, len(one) + len(three), "aux")
    both = torch.tensor([one[: len(three)], three])
    with torch.inference_mode():
        decoder.feed(both, torch.ones_like(both).bool())
        for place, token in enumerate(one):
            more = three[place] if place < len(three) else vocab.text_start
            restart = torch.tensor([place == 0, False])
            states = decoder.feed(torch.tensor([[token], [more]]), torch.tensor([[True], [True]]), restart)
            torch.testing.assert_close(states[0], whole(model, one[: place + 1], vocab, "aux")[-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_caches_on_a_cpu_are_at_least_fp32(dtype, variants, make_model):
    model = make_model(variants["dense"], dtype=dtype, n_heads=4, n_kv_heads=2)
    assert compute_dtype(model) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        caches = build_caches(model, 3, 5)
    assert len(caches) == 2
    for cache in caches:
        k_RGLA, v_RGLA = (torch.randn(3, 2, 2, 4).to(torch.bfloat16) for _ in range(2))
        for number in (1, 2):  # bf16 keys are kept exactly; slots that are still empty are not handed out
            keys, values = cache.update(k_RGLA, v_RGLA)
            assert keys.dtype == values.dtype == dtype and keys.shape == values.shape == (3, 2, 2 * number, 4)
            assert torch.equal(keys[:, :, -2:], k_RGLA.to(dtype)) and torch.equal(values[:, :, -2:], v_RGLA.to(dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_made_ready_for_decoding_once(precision, variants, make_model):
    model = make_model(variants["moe_4t4i"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ready = for_decoding(model)
        assert ready is not model and for_decoding(ready) is ready
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {m.dtype for m in matrices(ready).values()} == {wanted}
    for name, matrix in matrices(model).items():
        assert torch.equal(matrices(ready)[name], matrix.to(wanted)), name


def test_a_full_cache_is_an_error(variants, make_model):
    variant = variants["dense"]
    decoder = Decoder(make_model(variant), variant.vocabulary, 1, 2, "aux")
    with pytest.raises(ValueError, match="got token 3 for a cache of 2, need room: build a longer one"):
        decoder.feed(torch.zeros(1, 3).long(), torch.ones(1, 3).bool())
