"""What makes a step fast, as counts that no machine's load can change: graphs, waits, FLOPs, bytes, bits.

A micro-batch's counts of text and image tokens are constants, so every kind of block is one graph for ever, and a
sparse layer does and keeps what a dense one does.
"""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moma.benchmarks.memory import peak_extra_bytes, saved_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.distributed import ParallelConfig, Ranks, arrange_, autocast
from moma.modality import padded_groups
from moma.model.attention import SharedAttentionConfig
from moma.model.depth import DepthConfig, FullDepthConfig
from moma.model.feed_forward import DenseConfig, SparseConfig, build_feed_forward
from moma.model.loss import linear_cross_entropy
from moma.model.transformer import Architecture, ModelConfig, build_model
from moma.objectives import NextTokenConfig, next_token
from moma.optim import OptimConfig, build_optimizer, clip_, step_
from moma.twin import alone, twin_of

CPU = torch.device("cpu")
MODEL = ModelConfig(dim=32, n_layers=2, n_heads=2)
FEED_FORWARDS = {
    "dense": DenseConfig(),
    "moe_1t1i": SparseConfig({"text": 1, "image": 1}),
    "moe_4t4i": SparseConfig({"text": 4, "image": 4}),
    "moe_8x": SparseConfig({"all": 8}),
}
ROWS, LENGTH = 2, 128
# host asks device: what a step must not do
WAITS = {
    *("_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2"),
    *("unique_consecutive", "equal", "is_nonzero", "repeat_interleave.Tensor", "bincount"),
}


def architecture(feed_forward="moe_4t4i", depth=None):
    return Architecture(MODEL, FEED_FORWARDS[feed_forward], SharedAttentionConfig(), depth or FullDepthConfig())


def batch_of(share, seed=0, padded=False):
    side, n_images = images_of(ROWS, LENGTH, share)
    vocab = vocabulary(256, side)
    batch = micro_batch(vocab, ROWS, LENGTH, n_images, documents=2, seed=seed)
    if padded:
        groups = padded_groups(batch.tokens_RL, torch.ones_like(batch.tokens_RL, dtype=torch.bool), vocab)
        batch = copy.copy(batch)
        object.__setattr__(batch, "groups", groups)
    return vocab, batch


class Subject:
    """A model with its optimizer, and whole steps of it."""

    def __init__(self, made, precision="fp32", compiled=False, seed=0):
        self.model = build_model(made, 256, seed=seed)
        self.twin = twin_of(self.model, torch.bfloat16) if precision == "bf16" else alone(self.model)
        self.precision = precision
        arrange_(self.twin.model, ParallelConfig("cpu", "on" if compiled else "off"), Ranks(0, 1), precision, CPU)
        self.optimizer = build_optimizer(self.model.named_parameters(), OptimConfig())

    def gradients(self, vocab, batch):
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, CPU):
            loss, _, observed = next_token(NextTokenConfig(), self.twin.model, batch, batch.n_targets, vocab, False)
        loss.backward()
        return loss.detach(), observed

    def step(self, vocab, batch):
        loss, observed = self.gradients(vocab, batch)
        norm = clip_(self.model.parameters(), 1.0)
        step_(self.optimizer, ~norm.isfinite())
        self.twin.refresh()
        self.model.update_routing(observed, ~norm.isfinite())
        return loss


def layer_of(feed_forward, dim=512, hidden=1376):
    layer = build_feed_forward(FEED_FORWARDS[feed_forward], 0, 1, dim, hidden, ("text", "image"), False)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return layer


# --- graphs


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize(
    ("feed_forward", "depth"), [*((name, "full") for name in FEED_FORWARDS), ("moe_4t4i", "mod_quota")]
)
def test_fifty_mixed_batches_are_one_graph_per_kind_of_block(feed_forward, padded, depth, monkeypatch):
    """Exact: 50 batches of one share. Padded: 50 with 19 to 81 % image tokens."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    subject = Subject(
        architecture(feed_forward, DepthConfig(depth, start=1) if depth != "full" else None), compiled=True
    )
    shares = [(3 + seed % 11) / 16 for seed in range(50)] if padded else [0.5] * 50
    batches = [batch_of(share, seed, padded) for seed, share in enumerate(shares)]
    subject.step(*batches[0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (1 if depth == "full" else 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [subject.step(*batch) for batch in batches]
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert torch.stack(losses).isfinite().all() and len(set(torch.stack(losses).tolist())) > 40


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", ["full", "mod", "mod_quota"])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_no_operation_of_a_whole_step_asks_the_device(feed_forward, depth):
    subject = Subject(architecture(feed_forward, DepthConfig(depth) if depth != "full" else None), "bf16")
    vocab, batch = batch_of(0.5)
    with Operations() as seen:
        subject.step(vocab, batch)
    asked = {name for name in seen.names if name in WAITS or name.split(".")[0] in WAITS}
    assert len(seen.names) > 200 and not asked
    with Operations() as seen:  # the list does hold what it must
        batch.tokens_RL.sum().item(), (batch.tokens_RL > 3).nonzero()
    assert {"_local_scalar_dense.default", "nonzero.default"} <= set(seen.names)


# --- FLOPs and bytes


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_4t4i_does_the_flops_of_dense_and_of_its_routers(tokens):
    dim, counts = 512, {}
    batch = micro_batch(vocabulary(256, 8), 4, tokens // 4, tokens // 128)
    for name in ("dense", "moe_4t4i"):
        layer = layer_of(name)
        x_TD = torch.randn(tokens, dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y_TD, _ = layer(x_TD, batch.groups, "train")
            y_TD.sum().backward()
        counts[name] = counter.get_total_flops()
    routers = 6 * tokens * dim * 8
    assert counts["dense"] == 6 * tokens * dim * 1376 * 3
    assert counts["dense"] < counts["moe_4t4i"] <= 1.01 * (counts["dense"] + routers)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "compiled"), [("moe_1t1i", False), ("moe_4t4i", False), ("moe_4t4i", True), ("moe_8x", False)]
)
def test_a_sparse_layer_keeps_what_a_dense_one_keeps(name, low, compiled):
    tokens, dim, kept = 2048, 512, {}
    batch = micro_batch(vocabulary(256, 16), 4, tokens // 4, 4)
    for each in ("dense", name):
        layer = layer_of(each)
        if low:
            for key, parameter in layer.named_parameters():
                parameter.data = parameter.data.to(torch.float32 if "router" in key else torch.bfloat16)
        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else layer
        x_TD = torch.randn(tokens, dim, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            kept[each] = saved_bytes(lambda run=run, x_TD=x_TD: run(x_TD, batch.groups, "train"), layer.parameters())
    width = 2 if low else 4
    assert kept["dense"] == width * tokens * (dim + 2 * 1376)  # the states and the results of the first multiplication
    assert kept[name] <= 1.05 * kept["dense"]


# --- bits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_have_the_same_bits(precision):
    vocab, batch = batch_of(0.5)
    outcomes = []
    for _ in range(2):
        subject = Subject(architecture(), precision)
        losses = [subject.step(vocab, batch) for _ in range(3)]
        subject.gradients(vocab, batch)
        outcomes.append([*losses, *(p.grad for p in subject.model.parameters()), *subject.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_the_order_of_experts_makes_no_difference():
    layer, order = layer_of("moe_4t4i", 32, 96), [2, 0, 3, 1]
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for mine, theirs in zip(other.experts, layer.experts, strict=True):
            mine.w13.copy_(theirs.w13[order])
            mine.w2.copy_(theirs.w2[order])
        other.router.copy_(layer.router[:, [*order, *(4 + e for e in order)]])
    _, batch = batch_of(0.5)
    outcomes = []
    for each in (layer, other):
        x_TD = torch.randn(ROWS * LENGTH, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_TD, _ = each(x_TD, batch.groups, "train")
        outcomes.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, each.experts[0].w13])))
    (y, dx, dw), (y_other, dx_other, dw_other) = outcomes
    for one, another in ((y, y_other), (dx, dx_other), (dw[order], dw_other)):
        assert (one - another).abs().max() <= 1e-6 * one.abs().max()


# --- the loss head


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_the_head_is_right_and_takes_a_part_of_the_memory(dtype, bound):
    tokens, dim, size, z_weight = 1024, 64, 8192, 1e-5
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, dim, generator=generator).requires_grad_()
    weight_VD = (torch.randn(size, dim, generator=generator) / dim**0.5).requires_grad_()
    target_T = torch.randint(0, size, (tokens,), generator=generator)

    def exact():
        logit_TV = hidden_TD.double() @ weight_VD.double().T
        ce, lse = torch.nn.functional.cross_entropy(logit_TV, target_T), logit_TV.logsumexp(1)
        return ce + z_weight * lse.square().mean()

    def naive():
        logit_TV = (hidden_TD.to(dtype) @ weight_VD.to(dtype).T).float()
        ce, lse = torch.nn.functional.cross_entropy(logit_TV, target_T), logit_TV.logsumexp(1)
        (ce + z_weight * lse.square().mean()).backward()

    def ours():
        losses = linear_cross_entropy(
            hidden_TD, weight_VD, target_T, denominator=float(tokens), z_weight=z_weight, compute_dtype=dtype
        )  # fmt: skip
        losses.objective.backward()
        return losses.objective

    want = exact().detach()
    assert abs(ours().item() - want) <= bound * want
    assert peak_extra_bytes(ours, CPU) <= 0.30 * peak_extra_bytes(naive, CPU)
