"""Suite `decode` at toy shapes: what is timed is our generation, and the peer's of the same weights agrees with it."""

import pytest
import torch

from moma.benchmarks import decode
from moma.benchmarks.peers_model import peer_continued
from moma.benchmarks.timing import measure
from moma.config import compose

CPU = torch.device("cpu")
TOY = [
    *("suite=decode", "model=tiny", "model.dim=32", "model.n_layers=2", "model.n_heads=2", "row_length=64"),
    *("vocab_size=256", "prompt_tokens=5", "new_tokens=9", "precision=fp32"),
]


def config(*overrides):
    return compose("bench", [*TOY, *overrides]).config


def test_both_modes_of_every_variant():
    bench = decode.run(config("peers=false", "variants=[dense,moe_4t4i]"), CPU)
    names = ["dense, text", "dense, image", "moe_4t4i, text", "moe_4t4i, image"]
    assert [case.name for case in bench.cases] == names and bench.baseline == names[0]
    vocab = decode.picture_of(decode.vocabulary(256), 9)
    for case in bench.cases:
        (made,) = [case.run()]
        image = [vocab.image_start <= token < vocab.image_stop for token in made.tokens]
        assert len(made.tokens) == 9 == case.tokens and image == [case.name.endswith("image")] * 8 + [False]
    # one layer reads 3 D F + 4 D^2 and its norms, a token one expert and the router; the head its mode's rows
    rows = {"text": 256 - 38 + 2, "image": 32}
    for mode, n in rows.items():
        dense = 4 * (2 * (3 * 32 * 96 + 4 * 32**2 + 2 * 32 + 4 * 16) + 32 + n * 32)
        assert bench.facts["bytes_per_token"]["dense"][mode] == dense
        assert bench.facts["bytes_per_token"]["moe_4t4i"][mode] == dense + 4 * 2 * 8 * 32
    readings, absent = measure(bench, 3, 1, CPU, {"read": 1e9})
    assert not absent and all(each.ceiling_share is not None for each in readings)
    assert {goal.case for goal in bench.goals} == {"dense, text", "dense, image"}


def test_cut_offs_are_those_of_a_micro_batch():
    wanted = config()
    routers = decode.build(wanted, "moe_4t4i", CPU).routers()
    assert len(routers) == 2 and all(router.routing_state()["cutoff"].all() for router in routers.values())


def test_the_peer_writes_the_same_text():
    pytest.importorskip("transformers")
    wanted = config()
    model = decode.build(wanted, "dense", CPU)
    with torch.no_grad():  # so that the ids which our text may not have are never the likeliest
        model.head.weight[:38] *= 0.01
    vocab = decode.picture_of(decode.vocabulary(256), 9)
    prompt = decode.prompt_of(vocab, 5, "text", 1)
    ours = decode.continued(model, vocab, prompt, 9, "fp32").tokens
    assert len(ours) == 9 and len(set(ours)) > 1
    bench = decode.run(config("variants=[dense]"), CPU)
    assert [case.name for case in bench.cases][2:] == [decode.PEER, f"{decode.PEER}, static cache"]
    peer = decode._peer(model, vocab, 14, "fp32")
    for cache in (None, "static"):
        assert peer_continued(peer, vocab, prompt, 9, cache) == ours
    assert len(bench.cases[3].run()) == 9 and not bench.absent


def test_too_few_tokens():
    with pytest.raises(ValueError, match="got new_tokens=1, need a picture's code and its end: at least 2"):
        decode.run(config("new_tokens=1"), CPU)
    early = decode.Generation([1], [0.0], True)
    with pytest.raises(ValueError, match="got continuations that end before new_tokens=9 for 8 prompts, need one"):
        decode._long_enough(lambda prompt: early, config(), decode.vocabulary(256), "text")


def test_goals_of_a_gpu():
    found = decode.goals(config("variants=[dense,moe_4t4i]"), "cuda")
    assert [(goal.of, goal.bound) for goal in found] == [("ceiling", 0.6), ("time", 3.0), ("time", 1.2)]
    assert decode.goals(config("variants=[moe_4t4i]"), "cpu") == []
