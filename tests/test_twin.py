"""The working copy in bf16 computes what autocast over the masters does, to the last bit, and casts once per step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.distributed import ParallelConfig, Ranks, arrange_
from moma.model.attention import SharedAttentionConfig, UntiedAttentionConfig
from moma.model.depth import DepthConfig, FullDepthConfig
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.transformer import Architecture, ModelConfig, build_model
from moma.objectives import NextTokenConfig, next_token
from moma.twin import alone, twin_of

KINDS = {
    "dense": (DenseConfig(), SharedAttentionConfig(), FullDepthConfig()),
    "moe_4t4i": (SparseConfig({"text": 4, "image": 4}, shared=1), SharedAttentionConfig(), FullDepthConfig()),
    "untied_mod": (SparseConfig({"all": 4}), UntiedAttentionConfig(), DepthConfig("mod_quota", capacity=0.5)),
}


def model_of(kind):
    feed_forward, attention, depth = KINDS[kind]
    return build_model(Architecture(ModelConfig(32, 2, 2), feed_forward, attention, depth), 256, seed=0)


def batches(n):
    side, n_images = images_of(2, 64, 0.5)
    vocab = vocabulary(256, side)
    return vocab, [micro_batch(vocab, 2, 64, n_images, documents=2, seed=seed) for seed in range(n)]


def gradients(model, twin, recompute="none", n=2):
    vocab, drawn = batches(n)
    arrange_(twin.model, ParallelConfig("cpu", "off", recompute=recompute), Ranks(0, 1), "bf16", torch.device("cpu"))
    losses = []
    for batch in drawn:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = next_token(NextTokenConfig(), twin.model, batch, n * batch.n_targets, vocab, False)
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_autocast_s_to_the_last_bit(kind, recompute):
    plain, other = model_of(kind), model_of(kind)
    twin = twin_of(other, torch.bfloat16)
    expected, wanted = gradients(plain, alone(plain))
    losses, got = gradients(other, twin, recompute)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert got.keys() == wanted.keys()
    assert all(got[name] is not None and torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(grad.dtype == torch.float32 for grad in got.values()) and all(low.grad is None for low in twin.low)


def test_frozen_matrices_get_no_gradient():
    model = model_of("moe_4t4i")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("w13" not in name)
    twin = twin_of(model, torch.bfloat16)
    _, got = gradients(model, twin)
    assert {name for name, grad in got.items() if grad is None} == {name for name in got if "w13" in name}


def test_what_is_not_multiplied_in_bf16_is_shared_and_the_rest_follows_the_masters():
    model = model_of("moe_4t4i")
    twin = twin_of(model, torch.bfloat16)
    own = dict(twin.model.named_parameters())
    for name, master in model.named_parameters():
        low = "wqkv" in name or "wo." in name or "w13" in name or "w2" in name
        assert (own[name] is not master) == low == (own[name].dtype == torch.bfloat16), name
    for name, buffer in model.named_buffers():
        assert dict(twin.model.named_buffers())[name] is buffer
    with torch.no_grad():
        for master in model.parameters():
            master.add_(1.0)
    assert not torch.equal(twin.low[0], twin.masters[0].bfloat16())
    twin.refresh()
    assert all(torch.equal(low, master.bfloat16()) for low, master in zip(twin.low, twin.masters, strict=True))


def test_nothing_of_a_block_is_cast_again_for_every_micro_batch():
    class Casts(TorchDispatchMode):
        shapes: list[torch.Size]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
                self.shapes.append(out.shape)
            return out

    counts = []
    for make in (alone, lambda model: twin_of(model, torch.bfloat16)):
        model = model_of("moe_4t4i")
        twin, casts = make(model), Casts()
        casts.shapes = []
        matrices = {p.shape for name, p in model.blocks.named_parameters() if "w13" in name}
        with casts:
            gradients(model, twin, n=1)
        counts.append(sum(shape in matrices for shape in casts.shapes))
    assert counts[0] >= 2 * 3 and counts[1] == 0  # two layers of two groups and a shared expert each, or none
