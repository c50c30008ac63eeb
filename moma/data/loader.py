"""Optimizer steps in order, built ahead by one background thread; the loader's state is a small plain dict.

    plan state -> micro-batches of a step: n, n + 1, ...  -> rank's own -> build_batch -> bounded queue -> the loop
                                                          -> all of them -> valid targets of the step

Every rank walks the same plan and builds only its own micro-batches, so the state after a step is the same
everywhere and resumes at any world size; and it counts the targets of all of them, so that no rank has to ask another
what to divide a loss by.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moma.data.batch import Batch, TokenReader, build_batch, count_targets
from moma.data.plan import MicroBatch, Plan
from moma.modality import Vocabulary


class Step(NamedTuple):
    """One optimizer step as one rank sees it: its own micro-batches, valid targets of all ranks, state after it, and
    what the micro-batches of all ranks are made of."""

    batches: list[Batch]
    n_targets: int
    state: dict[str, Any]
    planned: list[MicroBatch]


class Loader:
    """Iterate over `Step`s of `per_step` micro-batches; close it when done. Errors of the thread reach the reader.

    `rank`, `world`: of a step's micro-batches this process builds rank, rank + world, ... `pin`: into memory from
    which a GPU fetches them by itself.
    """

    def __init__(
        self,
        plan: Plan,
        readers: Mapping[str, TokenReader],
        vocab: Vocabulary,
        *,
        state: dict[str, Any] | None = None,
        per_step: int = 1,
        rank: int = 0,
        world: int = 1,
        ahead: int = 4,
        padded: bool = False,
        pin: bool = False,
    ) -> None:
        self.plan, self.readers, self.vocab = plan, {name: readers[name] for name in plan.sources}, vocab
        self.state, self.per_step, self.rank, self.world, self.padded = state, per_step, rank, world, padded
        self.pin = pin
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="moma-loader", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            own, planned, n_targets = [], [], 0
            for micro_batch, state in self.plan.run(self.state):
                planned.append(micro_batch)
                place = micro_batch.number % self.per_step
                if place % self.world == self.rank:
                    own.append(build_batch(micro_batch, self.readers, self.plan.shape, self.vocab, self.padded))
                    n_targets += own[-1].n_targets
                    own[-1] = own[-1].pinned() if self.pin else own[-1]
                else:
                    n_targets += count_targets(micro_batch, self.readers)
                if place == self.per_step - 1:
                    self._put(Step(own, n_targets, state, planned))
                    own, planned, n_targets = [], [], 0
                if self._stop.is_set():
                    return
            self._put(None)
        except Exception as error:  # handed to the reader, who raises it in the loop's own thread
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Step]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()
