"""How a model is shared out: sizes of the parts on process groups that are not there, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moma.distributed import Late, ParallelConfig, Ranks, average_, cut_along, peak_flops, shard_, sum_
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
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**wrong)


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
