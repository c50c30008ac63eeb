"""How a model is shared out: sizes of the parts on process groups that are not there, and what is refused."""

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moma import distributed
from moma.benchmarks.micro_batch import micro_batch, vocabulary
from moma.distributed import (
    Late,
    ParallelConfig,
    Ranks,
    arrange_,
    autocast,
    average_,
    begin_pass,
    cut_along,
    fast_float32,
    helps_float32,
    peak_flops,
    shard_,
    sum_,
)
from moma.model.attention import document_mask
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.precision import wants_full_precision
from moma.model.transformer import Architecture, ModelConfig, build_model

FEED_FORWARDS = {
    "dense": DenseConfig(),
    "8x": SparseConfig(experts={"all": 8}),
    "4t4i": SparseConfig(experts={"text": 4, "image": 4}),
    "1t1i": SparseConfig(experts={"text": 1, "image": 1}),
}


def local_shapes(world, rank, feed_forward, dim, replicas=1):
    """Shapes of one rank's parts beside the whole ones, on a process group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        model = build_model(
            Architecture(ModelConfig(dim=dim, n_layers=1, n_heads=2), FEED_FORWARDS[feed_forward]), 1000, seed=0
        )
        parallel = ParallelConfig(shard=True, replicas=replicas)
        shard_(model, parallel, Ranks(rank, world), "bf16", torch.device("cpu"))
        return {
            name: (tuple((p.to_local() if isinstance(p, DTensor) else p).shape), tuple(p.shape))
            for name, p in model.named_parameters()
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize(("world", "replicas"), [(3, 1), (8, 1), (16, 1), (16, 2)])
def test_no_process_is_left_without_its_part(world, replicas, feed_forward):
    dim = 48 if world == 3 else 64  # a width that the number of processes divides
    found = [local_shapes(world, rank, feed_forward, dim, replicas) for rank in (0, world - 1)]
    for name, (_, whole) in found[0].items():
        for own, _ in (one[name] for one in found):
            n = torch.Size(own).numel()
            if wants_full_precision(name):
                assert own == whole
            elif whole[0] == 1000:  # embedding and head, cut along the vocabulary
                assert 0 < n <= -(-1000 // (world // replicas)) * dim
            else:
                assert n * world // replicas == torch.Size(whole).numel(), (name, own, whole)


@pytest.mark.parametrize(
    ("shape", "parts", "dim"),
    [
        ((4, 512, 2752), 2, 0),
        ((4, 512, 2752), 8, 1),
        ((1, 2304, 12288), 3, 1),
        ((8, 1376, 512), 16, 1),
        ((65536, 512), 3, 0),
        ((7, 5), 3, 0),
    ],
)
def test_a_parameter_is_cut_along_the_first_dimension_that_gives_equal_parts(shape, parts, dim):
    assert cut_along(shape, parts) == dim


@pytest.mark.parametrize("shape", [(4, 512, 2752), (1, 512, 2752), (4, 5)])
def test_a_cut_that_leaves_a_process_without_a_part_is_refused(shape):
    assert -(-shape[0] // 3) * 2 >= shape[0]
    with pytest.raises(
        ValueError, match=r"got 3 processes for a parameter of .*, need a number that divides one of the"
    ):
        cut_along(shape, 3)


def test_replicas_divide_the_processes():
    with pytest.raises(ValueError, match=r"got parallel.replicas=3 of 4 processes, need a divisor: change one"):
        shard_(None, ParallelConfig(shard=True, replicas=3), Ranks(0, 4), "fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 2}, r"got parallel.replicas=2 and shard=False, need at least 1, and shard=true for more"),
        ({"processes": 0}, r"got parallel.processes=0, need at least 1, or null for this process"),
        ({"timeout_min": 0}, r"got parallel.timeout_min=0, need minutes above 0: change it"),
        ({"threads": 0}, r"got threads=0, need at least 1, or null"),
        ({"cuda_graphs": True, "compile": "off"}, r"got parallel.cuda_graphs=true with compile=off, .*need compiled"),
        ({"cuda_graphs": True, "device": "cpu"}, r"got .* device=cpu, .*need .* on a GPU .*: set parallel.cuda_graphs"),
        ({"cuda_graphs": True, "shard": True}, r"got .* shard=True, need .* that holds all parameters: set parallel"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**wrong)


def test_cuda_graphs_need_a_gpu_and_keep_gradients_out_of_the_graphs_memory():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[0].grad = torch.ones(2)
    parameters[2].requires_grad_(False)
    begin_pass(ParallelConfig(), parameters)
    assert [p.grad is None for p in parameters] == [False, True, True]
    graphs = ParallelConfig(cuda_graphs=True)
    begin_pass(graphs, parameters)
    assert parameters[0].grad.tolist() == [1, 1] and parameters[1].grad.tolist() == [0, 0]
    assert parameters[2].grad is None
    model = build_model(Architecture(ModelConfig(dim=8, n_layers=1, n_heads=2)), 20, seed=0, device="meta")
    with pytest.raises(ValueError, match="got parallel.cuda_graphs=true on cpu, need a GPU: set parallel.cuda_graphs"):
        arrange_(model, graphs, Ranks(0, 1), "fp32", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_graphs_on_a_gpu_give_the_same_gradients(device="cuda"):
    """Two micro-batches a step, with another content each time; what the routers observed is kept over both."""
    vocab, gradients, observed = vocabulary(512, 4), [], []
    for graphs in (False, device == "cuda"):
        torch.compiler.reset()
        architecture = Architecture(ModelConfig(dim=64, n_layers=3, n_heads=2), FEED_FORWARDS["4t4i"])
        model = build_model(architecture, vocab.size, vocab.modalities, seed=0, device=device)
        parallel = ParallelConfig(compile="on", cuda_graphs=graphs)
        arrange_(model, parallel, Ranks(0, 1), "bf16", torch.device(device))
        for step in range(4):
            model.zero_grad(set_to_none=True)
            kept = []
            for number in range(2):
                batch = micro_batch(vocab, 2, 256, 8, documents=2, seed=2 * step + number).to(device)
                begin_pass(parallel, model.parameters())
                mask = document_mask(batch.document_RL)
                with autocast("bf16", torch.device(device)):
                    hidden_RLD, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups)
                (hidden_RLD.float() * batch.tokens_RL[..., None].sin()).sum().backward()
                kept.append([value / 2 for s in stats.values() for value in s.observed.values()])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        observed.append([a + b for a, b in zip(*kept, strict=True)])
    for name, wanted in gradients[0].items():
        assert (gradients[1][name] - wanted).norm() <= 1e-3 * wanted.norm(), name
    for got, wanted in zip(observed[1], observed[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_the_peak_is_that_of_all_devices():
    assert peak_flops(ParallelConfig(peak_flops=1e12), torch.device("cpu"), 4) == 4e12
    assert peak_flops(ParallelConfig(), torch.device("cpu"), 4) is None


def test_what_a_step_told_is_read_as_many_steps_late_as_wanted():
    late, told = Late(), torch.zeros(2)
    late.send(1, told)
    told += 1
    late.send(2, told)
    assert list(late.read(1)) == [(1, [0.0, 0.0])]
    assert list(late.read(1)) == []
    assert list(late.read(0)) == [(2, [1.0, 1.0])]


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_travel_in_the_type_that_was_asked_for(world):
    """On a group that sends nothing, a sum is what went in, rounded to what it travelled as; alone, nothing travels."""
    value = torch.tensor([1 / 3, 1e-3])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        low, full, summed = value.clone(), value.clone(), value.clone()
        average_([low], torch.bfloat16)
        average_([full], torch.float32)
        sum_([summed], torch.bfloat16)
    finally:
        dist.destroy_process_group()
    rounded = value if world == 1 else value.bfloat16().float()
    assert torch.equal(low, rounded / world) and torch.equal(full, value / world) and torch.equal(summed, rounded)


def matmul_error(m, k, n):
    """Relative errors of a plain, a transposed and a batched fp32 matmul, against float64."""
    source = torch.Generator().manual_seed(m)
    x_BMK, w_BKN = (torch.randn(2, *size, generator=source) for size in ((m, k), (k, n)))
    exact = x_BMK.double() @ w_BKN.double()
    found = x_BMK @ w_BKN, torch.stack([(w.mT.contiguous() @ x.mT).mT for x, w in zip(x_BMK, w_BKN, strict=True)])
    return max(float((each - exact).norm() / exact.norm()) for each in found)


@pytest.mark.parametrize("size", [(1, 64, 128), (100, 513, 96), (512, 1376, 64), (2048, 64, 352)])
def test_fast_float32_is_float32(size):
    """Rounding to bf16 would err by 2e-3."""
    with fast_float32(torch.device("cpu")):
        assert matmul_error(*size) < 1e-6
        assert torch.get_float32_matmul_precision() == ("medium" if helps_float32(torch.device("cpu")) else "highest")


def test_fast_float32_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(distributed, "helps_float32", lambda device: True)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), fast_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("amd", "exact", "device"), [(False, True, "cpu"), (True, False, "cpu"), (True, True, "cuda"), (True, True, "cpu")]
)
def test_fast_float32_asks_for_the_processor_and_for_exactness(amd, exact, device, monkeypatch):
    monkeypatch.setattr(distributed, "_cpu_of_amd", lambda: amd)
    monkeypatch.setattr(distributed, "_onednn_keeps_float32", lambda: exact)
    wanted = amd and exact and device == "cpu"
    assert helps_float32(torch.device(device)) == wanted
    with fast_float32(torch.device(device)):
        assert torch.get_float32_matmul_precision() == ("medium" if wanted else "highest")


def test_a_library_that_rounds_is_found_out(monkeypatch):
    probe = distributed._onednn_keeps_float32.__wrapped__
    monkeypatch.setattr(distributed, "_bf16_allowed", contextlib.nullcontext)
    assert probe()
    monkeypatch.setattr(distributed, "_bf16_allowed", partial(torch.autocast, "cpu", torch.bfloat16))
    assert not probe()
