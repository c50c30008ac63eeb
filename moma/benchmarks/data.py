"""Micro-batches from a made-up corpus on disk: how many tokens per second the loader hands to the training loop.

    loader, R x L      a `Loader` from its start: plan, reading and index sets in its thread, the loop takes the steps
    plan alone         who stands where, nothing read
    batches alone      micro-batches that are planned already: reading, targets, index sets
    small rows         the loader at SMALL: every micro-batch costs something, however few its tokens

A training step that takes longer than its tokens take here never waits for data.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moma.benchmarks.config import BenchConfig
from moma.benchmarks.timing import Bench, Case, Goal
from moma.data.batch import build_batch
from moma.data.loader import Loader
from moma.data.plan import Plan, PlanShape
from moma.data.shards import ShardedSource, open_corpus
from moma.data.synthetic import write_synthetic
from moma.modality import Vocabulary

DOCUMENTS = 4000  # pairs, and as many texts
GRID = (4, 4)  # codes of a picture
SMALL = (8, 512)
TOKENS = 500_000  # of one repetition, about
GOAL = 1e6  # tokens/s on two cores, one for the loader's thread and one for the loop


@dataclass
class Corpus:
    """An open corpus; `folder` is removed with it."""

    folder: tempfile.TemporaryDirectory[str]
    sources: dict[str, ShardedSource]
    vocab: Vocabulary


def run(config: BenchConfig, device: torch.device) -> Bench:
    """The loader at `rows` x `row_length` is the baseline; nothing here depends on the device."""
    corpus = make_corpus(min(DOCUMENTS, config.tokens), config.seed)
    shape = shape_of(config.rows, config.row_length, config.image_share)
    small = shape_of(*SMALL, config.image_share)
    name = f"loader, {shape.rows} x {shape.row_length}"
    cases = [
        loader_case(name, corpus, shape, config.seed),
        *_halves(corpus, shape, config.seed),
        loader_case(f"loader, small rows, {small.rows} x {small.row_length}", corpus, small, config.seed),
    ]
    twin = loader_case(f"{name} again", corpus, shape, config.seed)
    goal = Goal("D1", "tokens/s of the loader", GOAL, name, None, "tokens", at_least=True)
    first, _ = next(Plan(corpus.sources, shape, config.seed).run())
    facts = {
        "rows": shape.rows,
        "row_length": shape.row_length,
        "images": shape.images,
        "pieces_per_micro_batch": sum(map(len, first.rows)),
        "bytes_on_disk": sum(path.stat().st_size for path in Path(corpus.folder.name).rglob("*") if path.is_file()),
    }
    return Bench(cases, name, twin, [], facts, [goal])


def make_corpus(documents: int, seed: int) -> Corpus:
    """Pairs and texts, `documents` of each."""
    folder = tempfile.TemporaryDirectory(prefix="moma-bench-")
    made = write_synthetic(Path(folder.name) / "made", pairs=documents, texts=documents, grid=GRID, seed=seed)
    _, corpus, vocab = made
    return Corpus(folder, open_corpus(corpus, "train", vocab.hash), vocab)


def shape_of(rows: int, row_length: int, image_share: float) -> PlanShape:
    """A micro-batch of which about `image_share` are image codes, though no more than leaves room for the rest of the
    documents that hold them."""
    codes = GRID[0] * GRID[1]
    most = rows * (row_length // (2 * codes))  # a pair has at most twice as many tokens
    return PlanShape(rows, row_length, max(1, min(most, round(image_share * rows * row_length / codes))))


def loader_case(name: str, corpus: Corpus, shape: PlanShape, seed: int) -> Case:
    """Micro-batches of about `TOKENS` tokens from a new loader, which has made a few more by then."""
    plan, steps = Plan(corpus.sources, shape, seed), _steps(shape)

    def load() -> Any:
        loader = Loader(plan, corpus.sources, corpus.vocab)
        for _ in islice(loader, steps):
            pass
        loader.close()

    return _timed(name, load, shape)


def _halves(corpus: Corpus, shape: PlanShape, seed: int) -> list[Case]:
    """What the loader's thread does, its two parts each for itself."""
    plan, steps = Plan(corpus.sources, shape, seed), _steps(shape)
    planned = [micro_batch for micro_batch, _ in islice(plan.run(), steps)]

    def walk() -> None:
        for _ in islice(plan.run(), steps):
            pass

    def build() -> None:
        for micro_batch in planned:
            build_batch(micro_batch, corpus.sources, shape, corpus.vocab)

    return [_timed("plan alone", walk, shape), _timed("batches alone", build, shape)]


def _steps(shape: PlanShape) -> int:
    return max(2, TOKENS // (shape.rows * shape.row_length))


def _timed(name: str, work: Callable[[], Any], shape: PlanShape) -> Case:
    return Case(name, work, tokens=_steps(shape) * shape.rows * shape.row_length)
