"""Batches: constant counts, targets, continuation across cuts, padding; the loader's order and errors."""

import numpy as np
import pytest
import torch

from moma.data.batch import build_batch
from moma.data.loader import Loader
from moma.data.plan import Plan, PlanShape
from moma.data.shards import open_corpus
from moma.data.synthetic import write_synthetic
from moma.modality import IGNORE, TEXT, modality_of
from moma.model.attention import document_mask
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.transformer import Architecture, ModelConfig, build_model

SHAPE = PlanShape(rows=2, row_length=96, images=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    _, corpus, vocab = write_synthetic(tmp_path_factory.mktemp("made"), pairs=40, texts=40)
    return dict(open_corpus(corpus, "train", vocab.hash)), vocab


def test_counts_are_constant_and_groups_partition_the_tokens(made):
    sources, vocab = made
    plan = Plan(sources, SHAPE, seed=0)
    for (micro_batch, _), _ in zip(plan.run(), range(30), strict=False):
        batch = build_batch(micro_batch, sources, SHAPE, vocab)
        assert batch.exact and batch.groups.valid is None
        image, text = 4 * vocab.tokens_per_image, 2 * 96 - 4 * vocab.tokens_per_image
        assert [len(i) for i in batch.groups.index] == [text, image]
        modality = modality_of(batch.tokens_RL.flatten(), vocab)
        for m, (index, slot) in enumerate(zip(batch.groups.index, batch.groups.slot, strict=True)):
            assert (modality[index] == m).all() and (index.diff() > 0).all()
            assert torch.equal(slot[index], torch.arange(len(index))) and int((slot >= 0).sum()) == len(index)


def test_targets_follow_inputs_even_across_a_cut(made):
    """Rebuild every document from (input, target) pairs: each token but the first is a target exactly once."""
    sources, vocab = made
    plan = Plan(sources, SHAPE, seed=0, passes=1)
    targets = {name: {} for name in sources}
    for micro_batch, _ in plan.run():
        batch = build_batch(micro_batch, sources, SHAPE, vocab)
        for row, pieces in enumerate(micro_batch.rows):
            at = 0
            for piece in pieces:
                for offset in range(piece.tokens):
                    value = int(batch.target_RL[row, at + offset])
                    if value != IGNORE:
                        key = (piece.doc, piece.start + offset + 1)
                        assert key not in targets[piece.source]
                        targets[piece.source][key] = value
                at += piece.tokens
            assert (batch.document_RL[row, at:] == -1).all() and (batch.target_RL[row, at:] == IGNORE).all()
            assert (batch.tokens_RL[row, at:] == vocab.pad).all()
        assert batch.n_targets == int((batch.target_RL != IGNORE).sum())
    for name, source in sources.items():
        for doc in range(source.n_documents):
            ids = source.read(doc, 0, int(source.document_tokens[doc]))
            assert ids[0] == vocab.bos and ids[-1] == vocab.eos
            assert [targets[name][(doc, t)] for t in range(1, len(ids))] == ids[1:].tolist()
            assert (doc, 0) not in targets[name]


def test_masked_tokens_are_inputs_but_no_targets(made):
    sources, vocab = made

    class Masked:
        def __init__(self, source):
            self.read = source.read
            self.read_mask = lambda doc, a, b: (np.arange(a, b) % 2).astype(np.uint8)

    micro_batch, _ = next(Plan(sources, SHAPE, seed=0).run())
    batch = build_batch(micro_batch, {n: Masked(s) for n, s in sources.items()}, SHAPE, vocab)
    plain = build_batch(micro_batch, sources, SHAPE, vocab)
    assert torch.equal(batch.tokens_RL, plain.tokens_RL)
    for row, pieces in enumerate(micro_batch.rows):
        at = 0
        for piece in pieces:
            place = torch.arange(piece.start + 1, piece.stop + 1)
            got, want = (
                batch.target_RL[row, at : at + piece.tokens],
                plain.target_RL[row, at : at + piece.tokens],
            )
            assert torch.equal(got, torch.where(place % 2 == 1, want, IGNORE))
            at += piece.tokens


def test_padded_form_at_the_end_of_a_finite_stream(made):
    sources, vocab = made
    last = [m for m, _ in Plan(sources, SHAPE, seed=0, passes=1).run()][-1]
    batch = build_batch(last, sources, SHAPE, vocab)
    assert not batch.exact and batch.groups.valid is not None
    present = (batch.document_RL >= 0).flatten()
    counts = [int(v.sum()) for v in batch.groups.valid]
    assert sum(counts) == int(present.sum()) < present.numel()
    merged = batch.groups.merged()
    assert torch.equal(merged.valid[0], present)
    assert all((slot[~present] == -1).all() for slot in batch.groups.slot)


def test_loader_gives_the_plan_in_order_and_ranks_share_it(made):
    sources, vocab = made
    plan = Plan(sources, SHAPE, seed=0)
    straight = [m for (m, _), _ in zip(plan.run(), range(8), strict=False)]
    tokens = [build_batch(m, sources, SHAPE, vocab).tokens_RL for m in straight]
    targets = [build_batch(m, sources, SHAPE, vocab).n_targets for m in straight]
    states = [state for (_, state), _ in zip(plan.run(), range(8), strict=False)]
    for world in (1, 2, 4):
        for rank in range(world):
            loader = Loader(plan, sources, vocab, per_step=4, rank=rank, world=world)
            got = [step for step, _ in zip(loader, range(2), strict=False)]
            loader.close()
            for n, step in enumerate(got):
                assert [b.number for b in step.batches] == list(range(4 * n, 4 * n + 4))[rank::world]
                assert all(torch.equal(b.tokens_RL, tokens[b.number]) for b in step.batches)
                assert step.n_targets == sum(targets[4 * n : 4 * n + 4])  # of all ranks, whoever built them
                assert step.state == states[4 * n + 3]


@pytest.fixture(scope="module")
def four(made, tmp_path_factory):
    """Two sources with images and two without."""
    sources, vocab = made
    _, corpus, _ = write_synthetic(tmp_path_factory.mktemp("more"), pairs=30, texts=20, seed=1)
    more = open_corpus(corpus, "train", vocab.hash)
    return {**sources, "couple": more["pair"], "prose": more["text"]}, vocab


@pytest.mark.parametrize(
    "mixture",
    [
        {},
        {"pair": 3.0, "couple": 1.0, "prose": 1.0, "text": 1.0},
        {"pair": 1.0, "couple": 9.0, "prose": 0},
        {"pair": 0, "prose": 5.0, "text": 1.0},
    ],
)  # fmt: skip
def test_every_rank_has_the_same_images_and_tokens_at_any_world_size(four, mixture):
    """Per-rank counts are equal by construction, and all ranks together see what one process sees."""
    sources, vocab = four
    stages = [(16, {"pair": 1.0, "couple": 1.0})]
    counts = [2 * 96 - 4 * vocab.tokens_per_image, 4 * vocab.tokens_per_image]
    for world in range(1, 9):
        per_step = 2 * world
        alone = Plan(sources, SHAPE, 0, mixture, stages=stages)
        straight = [batch for (batch, _), _ in zip(alone.run(), range(2 * per_step), strict=False)]
        tokens = [build_batch(batch, sources, SHAPE, vocab).tokens_RL for batch in straight]
        seen = {}
        for rank in range(world):
            plan = Plan(sources, SHAPE, 0, mixture, stages=stages)
            loader = Loader(plan, sources, vocab, per_step=per_step, rank=rank, world=world)
            for step, _ in zip(loader, range(2), strict=False):
                assert len(step.batches) == 2
                for batch in step.batches:
                    modality = modality_of(batch.tokens_RL, vocab)
                    assert [int((modality == m).sum()) for m in range(2)] == counts
                    assert [len(index) for index in batch.groups.index] == counts and batch.groups.valid is None
                    assert int((batch.tokens_RL == vocab.boi).sum()) == 4 and batch.number not in seen
                    seen[batch.number] = batch.tokens_RL
            loader.close()
        assert sorted(seen) == list(range(2 * per_step))
        assert all(torch.equal(seen[number], tokens[number]) for number in seen)


def test_source_of_every_token(four):
    sources, vocab = four
    plan = Plan(sources, SHAPE, 0, {"couple": 0})
    loader = Loader(plan, sources, vocab)
    batches = [step.batches[0] for step, _ in zip(loader, range(6), strict=False)]
    loader.close()
    met = set()
    for batch in batches:
        assert batch.source_RL.dtype == torch.int16 and torch.equal(batch.to("cpu").source_RL, batch.source_RL)
        for row, pieces in enumerate(plan.micro_batch(batch.number).rows):
            names = [piece.source for piece in pieces for _ in range(piece.tokens)]
            assert [list(plan.sources)[place] for place in batch.source_RL[row].tolist()] == names
            met |= set(names)
    assert met == set(plan.sources) == {"pair", "prose", "text"}
    last = [m for m, _ in Plan(sources, SHAPE, seed=0, passes=1).run()][-1]
    batch = build_batch(last, sources, SHAPE, vocab)
    assert torch.equal(batch.source_RL == -1, batch.document_RL == -1) and (batch.source_RL == -1).any()


@pytest.mark.parametrize(
    "feed_forward", [DenseConfig(), SparseConfig({"text": 1, "image": 1}), SparseConfig({"text": 4, "image": 4})]
)
def test_without_balance_index_sets_vary_and_the_model_runs_them(made, feed_forward):
    """Also where a modality is missing; the exact and the padded form of a batch are the same model."""
    sources, vocab = made
    plan = Plan(sources, SHAPE, seed=0, balance=False)
    batches = {}
    for (micro_batch, _), _ in zip(plan.run(), range(200), strict=False):
        batch = build_batch(micro_batch, sources, SHAPE, vocab)
        assert batch.exact and batch.groups.valid is None and sum(map(len, batch.groups.index)) == 2 * 96
        batches[micro_batch.images] = (batch, build_batch(micro_batch, sources, SHAPE, vocab, padded=True))
    assert len(batches) >= 6 and min(batches) == 0
    architecture = Architecture(ModelConfig(dim=32, n_layers=2, n_heads=2), feed_forward)
    model = build_model(architecture, vocab.size, vocab.modalities, seed=0).double()
    for images in (0, max(batches)):
        hidden = []
        for batch in batches[images]:
            assert images or (modality_of(batch.tokens_RL, vocab) == TEXT).all()
            model.zero_grad()
            mask = document_mask(batch.document_RL)
            hidden_TD, _ = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, "train")
            hidden_TD.square().sum().backward()
            hidden.append(hidden_TD)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(torch.isfinite(grad).all() for grad in grads)
        torch.testing.assert_close(hidden[0], hidden[1])


def test_loader_resumes_from_a_state_and_ends_with_a_finite_plan(made):
    sources, vocab = made
    loader = Loader(Plan(sources, SHAPE, seed=0), sources, vocab)
    stream = iter(loader)
    for _ in range(5):
        state = next(stream).state
    sixth = next(stream).batches[0]
    loader.close()
    again = Loader(Plan(sources, SHAPE, seed=0), sources, vocab, state=state)
    assert torch.equal(next(iter(again)).batches[0].tokens_RL, sixth.tokens_RL)
    again.close()
    finite = Plan(sources, SHAPE, seed=0, passes=1)
    assert len(list(Loader(finite, sources, vocab))) == len(list(finite.run()))


def test_an_error_in_the_thread_reaches_the_reader(made):
    sources, vocab = made

    class Broken:
        def read(self, doc, start, stop):
            raise ValueError("got a broken shard")

    loader = Loader(Plan(sources, SHAPE, seed=0), dict.fromkeys(sources, Broken()), vocab)
    with pytest.raises(ValueError, match="got a broken shard"):
        next(iter(loader))
    loader.close()
