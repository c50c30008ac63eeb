"""The state machine: cached generation equals full forward passes without cache, row by row, in float64."""

import pytest
import torch

from moma.generation.interleaved import (
    causal_mode,
    codes_left,
    full_context,
    generate,
    image_context,
    no_context,
)
from moma.generation.sampling import GREEDY, Sampling, row_uniforms, sample
from moma.modality import padded_groups
from moma.model.attention import document_mask

CASES = {
    "dense": "aux",
    "moe_1t1i": "aux",
    "moe_8x": "aux_calibrated",
    "moe_4t4i": "aux",
    "token_choice_4x": "aux",
    "threshold": "threshold",
    "untied_4t4i": "threshold",
    "mod_4t4i": "aux",
    "mod_quota_untied": "threshold",
}


@pytest.fixture(params=CASES.items(), ids=CASES.keys())
def case(request, variants, make_model, make_batch, settle):
    """A model, its vocabulary and a causal mode."""
    name, mode = request.param
    variant = variants[name]
    model, vocab = make_model(variant, aux_routers=True, seed=3), variant.vocabulary
    settle(model, make_batch(vocab, 0))
    return model, vocab, mode


def prompts_of(vocab):
    """Text, an open picture, a half-open one, a finished one, a lone BOS."""
    t, i, n = vocab.text_start, vocab.image_start, vocab.tokens_per_image
    return [
        [vocab.bos, t, t + 1, t + 2, vocab.boi],
        [vocab.bos, t + 3],
        [vocab.bos, vocab.boi, i + 1],
        [vocab.bos, t + 4, vocab.boi, *[i + 2] * n, vocab.eoi, t + 5],
        [vocab.bos],
    ]


def naive_logits(model, tokens, vocab, mode):
    ids = torch.tensor([tokens])
    document = torch.zeros_like(ids)
    groups = padded_groups(ids, document == 0, vocab)
    position = torch.arange(len(tokens))[None]
    hidden, _ = model(ids, position, document_mask(document), groups, mode)
    return (hidden[0, -1] @ model.head.weight.T).double()


@torch.no_grad()
def naive(model, prompt, vocab, row, mode, *, text, picture, steps, pictures, seed, cfg_text=1.0, cfg_image=1.0):
    """One row at a time, a full forward pass per token and context, masks over the whole vocabulary."""
    document, log_probs = list(prompt), []
    for step in range(steps):
        left = codes_left(document, vocab)
        if left == 0:
            document.append(vocab.eoi)
            log_probs.append(0.0)
            continue
        allowed = torch.zeros(vocab.size, dtype=torch.bool)
        if left is None:
            logits = naive_logits(model, document, vocab, mode)
            allowed[vocab.eos] = True
            allowed[vocab.text_start : vocab.text_stop] = True
            allowed[vocab.boi] = pictures and steps - step >= vocab.tokens_per_image + 2
        else:
            none, image, full = (
                naive_logits(model, context(document, vocab), vocab, mode)
                for context in (no_context, image_context, full_context)
            )
            logits = none + cfg_image * (image - none) + cfg_text * (full - image)
            allowed[vocab.image_start : vocab.image_stop] = True
        logits = logits.masked_fill(~allowed, -torch.inf)[None]
        seen = torch.zeros(1, vocab.size, dtype=torch.bool)
        seen[0, [t for t in document if vocab.text_start <= t < vocab.text_stop]] = True
        # the heads put EOS and BOI first, so that a draw walks the columns in this order
        order = [vocab.eos, vocab.boi, *range(vocab.text_start, vocab.text_stop)]
        order = order if left is None else list(range(vocab.image_start, vocab.image_stop))
        uniform = row_uniforms(seed, [row], steps)[:, step]
        column = sample(logits[:, order], uniform, text if left is None else picture, seen[:, order]).item()
        log_probs.append(logits[0, order].log_softmax(0)[column].item())
        document.append(order[column])
        if document[-1] == vocab.eos:
            break
    return document[len(prompt) :], log_probs


@pytest.mark.parametrize(
    "settings",
    [
        {"text": GREEDY, "picture": GREEDY},
        {"text": Sampling(0.9, repetition_penalty=1.3), "picture": Sampling(1.0, top_k=9, top_p=0.9)},
        {"text": Sampling(), "picture": GREEDY, "cfg_text": 3.0, "cfg_image": 3.0},
        {"text": Sampling(), "picture": Sampling(), "cfg_text": 3.0, "cfg_image": 1.2},
        {"text": Sampling(), "picture": Sampling(), "cfg_text": 2.0},
    ],
    ids=["greedy", "sampled", "two_way", "three_way", "image_scale_1"],
)
def test_cached_batches_equal_full_forwards_row_by_row(case, settings):
    model, vocab, mode = case
    prompts, steps = prompts_of(vocab), 16
    with torch.no_grad():
        model.head.weight[vocab.boi] *= 12  # so that text begins pictures
    both = {"text": settings["text"], "picture": settings["picture"], "pictures": True, "seed": 1}
    cfg_text, cfg_image = settings.get("cfg_text", 1.0), settings.get("cfg_image", 1.0)
    guidance = {"guidance": cfg_text, "guidance_image": cfg_image}
    made = generate(model, prompts, vocab, mode=mode, max_new_tokens=steps, **both, **guidance)
    begun = 0
    for row, (prompt, got) in enumerate(zip(prompts, made, strict=True)):
        tokens, log_probs = naive(
            model, prompt, vocab, row, mode, steps=steps, cfg_text=cfg_text, cfg_image=cfg_image, **both
        )
        assert got.tokens == tokens
        torch.testing.assert_close(torch.tensor(got.log_probs), torch.tensor(log_probs), rtol=0, atol=1e-9)
        assert got.finished == (tokens[-1] == vocab.eos)
        begun += tokens.count(vocab.boi)
    assert begun or settings["text"] == GREEDY, "a picture must begin inside text somewhere"


def test_every_document_is_well_formed(case):
    model, vocab, mode = case
    with torch.no_grad():
        model.head.weight[[vocab.boi, vocab.eos]] *= 2
    prompts = prompts_of(vocab) * 4
    made = generate(model, prompts, vocab, mode=mode, max_new_tokens=25, seed=2)
    assert any(row.finished for row in made) and not all(row.finished for row in made)
    for prompt, row in zip(prompts, made, strict=True):
        document = [*prompt, *row.tokens]
        body = document[:-1] if row.finished else document
        assert codes_left(body, vocab) is None, "no picture is cut off, nothing follows the end"
        text = [t for t in row.tokens if vocab.text_start <= t < vocab.text_stop]
        pictures = sum(vocab.image_start <= t < vocab.image_stop for t in row.tokens)
        structure = sum(t in (vocab.boi, vocab.eoi, vocab.eos) for t in row.tokens)
        assert len(text) + pictures + structure == len(row.tokens) == len(row.log_probs) <= 25


def test_a_row_does_not_depend_on_its_company(variants, make_model):
    variant = variants["moe_4t4i"]
    model, vocab = make_model(variant, aux_routers=True), variant.vocabulary
    prompts = prompts_of(vocab)
    how = {"mode": "aux", "max_new_tokens": 12, "seed": 4, "guidance": 2.0}
    together = generate(model, prompts, vocab, **how)
    for number in range(len(prompts)):
        (alone,) = generate(model, [prompts[number]], vocab, rows=[number], **how)
        assert alone.tokens == together[number].tokens
    again = generate(model, prompts, vocab, **how)
    assert [row.tokens for row in again] == [row.tokens for row in together]
    assert together != generate(model, prompts, vocab, **(how | {"seed": 5}))


def test_without_pictures_text_begins_none(variants, make_model):
    variant = variants["dense"]
    model, vocab = make_model(variant), variant.vocabulary
    with torch.no_grad():
        model.head.weight[vocab.boi] *= 50
    prompts = [[vocab.bos, vocab.text_start + i] for i in range(8)]
    how = {"mode": "aux", "max_new_tokens": 12, "guidance": 3.0}
    without = generate(model, prompts, vocab, pictures=False, **how)
    assert not any(vocab.boi in row.tokens for row in without)
    assert any(vocab.boi in row.tokens for row in generate(model, prompts, vocab, **how))
    # no room for a whole picture: the same
    short = generate(model, prompts, vocab, mode="aux", max_new_tokens=vocab.tokens_per_image + 1)
    assert not any(vocab.boi in row.tokens for row in short)


@pytest.mark.parametrize("name", ["dense", "moe_4t4i"])
def test_bf16_autocast(name, variants, make_model):
    variant = variants[name]
    model, vocab = make_model(variant, dtype=torch.float32, aux_routers=True), variant.vocabulary
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(model, prompts_of(vocab), vocab, mode="aux", max_new_tokens=8, guidance=2.0)
    assert all(len(row.tokens) == 8 or row.finished for row in made)
    assert all(torch.tensor(row.log_probs).isfinite().all() for row in made)


def test_models_without_routers_are_causal_in_every_mode(variants, make_model):
    for name in ("dense", "moe_1t1i", "token_choice", "threshold"):
        assert causal_mode(make_model(variants[name]), "train") == "aux"


def test_the_training_rule_is_refused(variants, make_model):
    model = make_model(variants["moe_4t4i"], aux_routers=True)
    text = (
        r"got mode=train for generation, need one of aux, aux_calibrated, threshold \(the training rule sees the "
        r"future\): use mode=threshold, or .*objective=aux_routers"
    )
    with pytest.raises(ValueError, match=text):
        causal_mode(model, "train")
    assert causal_mode(model, "aux") == "aux"
    for name in ("moe_4t4i", "mod_dense"):
        bare = make_model(variants[name])
        assert causal_mode(bare, "threshold") == "threshold"
        with pytest.raises(ValueError, match="got a model without auxiliary routers, need them .* in mode aux: use"):
            causal_mode(bare, "aux")


def test_contexts(vocabulary):
    v, t, i = vocabulary, vocabulary.text_start, vocabulary.image_start
    picture = [v.boi, i, i + 1, i + 2, i + 3, v.eoi]
    prompt = [v.bos, t, *picture, t + 1, v.boi, i + 4]
    assert full_context(prompt, v) == prompt
    assert image_context(prompt, v) == [v.bos, *picture, v.boi, i + 4]
    assert no_context(prompt, v) == [v.bos, v.boi, i + 4]
    assert no_context([v.bos, *picture, t], v) == [v.bos]


def test_prompts_must_begin_documents(vocabulary):
    v, t, i = vocabulary, vocabulary.text_start, vocabulary.image_start
    cases = [
        (
            [],
            "got prompt 7 without BOS in front, need the beginning of a document: encode it as the corpus",
        ),
        ([t], "without BOS in front"),
        ([v.bos, i], f"with id {i} at 1, need text or BOI there"),
        ([v.bos, t, v.eos], f"with id {v.eos} at 2, need text or BOI"),
        ([v.bos, v.size], f"with id {v.size} at 1, need text or BOI"),
        ([v.bos, v.boi, i, t], f"with id {t} at 3, need 3 more image codes there"),
        ([v.bos, v.boi, i, i, i, i, t], f"with id {t} at 6, need EOI after 4 image codes"),
    ]
    for prompt, text in cases:
        with pytest.raises(ValueError, match=text):
            codes_left(prompt, v, 7)
    assert codes_left([v.bos, v.boi, i], v) == 3
    assert codes_left([v.bos, v.boi, i, i, i, i], v) == 0


def test_an_open_picture_must_fit(variants, make_model):
    variant = variants["dense"]
    model, v = make_model(variant), variant.vocabulary
    with pytest.raises(
        ValueError,
        match="got max_new_tokens=4, need at least 5 for the open picture and its end: raise max_new_tokens",
    ):
        generate(model, [[v.bos, v.boi]], v, mode="aux", max_new_tokens=4)
    (row,) = generate(model, [[v.bos, v.boi]], v, mode="aux", max_new_tokens=5)
    assert row.tokens[-1] == v.eoi and not row.finished
    assert generate(model, [], v, mode="aux", max_new_tokens=5) == []
