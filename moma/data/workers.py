"""Chunks -> shards, by worker processes of this machine: `make_shard` is one shard, `in_processes` all of them.

A shard and its record in `.progress/` are written whole or not at all, the record last, so a worker may be killed
anywhere and two may make the same shard: the bytes are the same. The parent hands out two chunks a worker and
holds no more.
"""

import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moma.data.chunks import Chunk
from moma.data.encoding import AugmentConfig, Encoders, encode_chunk, load_encoders
from moma.data.near_duplicates import HeldOut, packed, unpacked
from moma.data.shards import token_dtype, write_bytes, write_json, write_shard
from moma.modality import Vocabulary

PROGRESS = ".progress"


class Setup(NamedTuple):
    """What a worker is told: where the corpus lies (as all workers see it), its tokenizer, and the policies.

    `sketch`: keep what tells near duplicates of these documents; `held_out`: file of such sketches to avoid.
    """

    corpus: Path
    asset: Path
    vocab: Vocabulary
    device: str
    on_error: str
    augment: AugmentConfig
    salt: str
    sketch: bool = False
    held_out: Path | None = None
    near_bits: int = 0
    near_overlap: float = 1.0


class Worker(NamedTuple):
    """A worker's tools, loaded once and used for every chunk that it gets."""

    setup: Setup
    encoders: Encoders
    held_out: HeldOut | None


def start_worker(setup: Setup, device: str | None = None) -> Worker:
    """Load the tokenizers and what is held out; `device` instead of the setup's."""
    # One thread: workers share the cores, and codes must not depend on how many threads summed.
    torch.set_num_threads(1)
    held_out = None
    if setup.held_out is not None:
        held_out = HeldOut(unpacked(setup.held_out), setup.near_bits, setup.near_overlap)
    return Worker(setup, load_encoders(setup.asset, setup.vocab, device or setup.device), held_out)


def make_shard(chunk: Chunk, worker: Worker) -> dict[str, Any]:
    """Encode and write one shard, then its record, which is returned: a shard without one is made again."""
    setup = worker.setup
    encoded = encode_chunk(
        chunk, worker.encoders, setup.on_error, setup.augment, setup.salt, worker.held_out, setup.sketch
    )
    folder = setup.corpus / chunk.split / chunk.source
    shard = write_shard(folder, chunk.number, encoded.documents, token_dtype(setup.vocab.size))
    if setup.sketch:
        write_bytes(setup.corpus / PROGRESS / f"{chunk.stem}.npz", packed(encoded.sketches))
    record = {
        "split": chunk.split,
        "source": chunk.source,
        "number": chunk.number,
        "listed": chunk.digest(),
        "shard": shard,
        "skipped": encoded.skipped,
    }
    write_json(setup.corpus / PROGRESS / f"{chunk.stem}.json", record)
    return record


def in_processes(chunks: Iterator[Chunk], setup: Setup, workers: int) -> Generator[dict[str, Any], None, None]:
    """Make a shard of every chunk; their records as they are finished. One worker works in this process.

    With `device` cuda every worker takes the next of the machine's GPUs. ValueError when a worker is killed.
    """
    if workers == 1:
        worker = start_worker(setup)
        for chunk in chunks:
            yield make_shard(chunk, worker)
        return
    # Spawned, not forked: forking a process that has used torch's threads can hang.
    context = get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_pool_worker, initargs=(setup, context.Value("i", 0))
    )
    waiting: set[Future[dict[str, Any]]] = set()
    try:
        for chunk in chunks:
            waiting.add(pool.submit(_make_in_pool, chunk))
            if len(waiting) >= 2 * workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"got a worker process that was killed (out of memory?), need all {workers} alive: start the "
            "same command again with fewer workers; finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# The one worker of a process of the pool.
_WORKER: list[Worker] = []


def _start_pool_worker(setup: Setup, started: Any) -> None:
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    device = setup.device
    if device == "cuda":
        with started.get_lock():
            device = f"cuda:{started.value % max(1, torch.cuda.device_count())}"
            started.value += 1
    _WORKER[:] = [start_worker(setup, device)]


def _make_in_pool(chunk: Chunk) -> dict[str, Any]:
    return make_shard(chunk, *_WORKER)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
