"""Batches in order, built ahead of the step by one background thread; its state is a small plain dict.

    plan state -> micro-batches rank, rank + world, ... -> build_batch -> bounded queue -> the loop

Every rank walks the same plan and builds only its own micro-batches, so the state after a step is the same
everywhere and resumes at any world size.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from moma.data.batch import Batch, TokenReader, build_batch
from moma.data.plan import Plan
from moma.modality import Vocabulary


class Loader:
    """Iterate over `(Batch, state after it)`; close it when done. Errors of the thread are raised to the reader.

    `rank`, `world`: this process builds micro-batches number = rank (mod world).
    """

    def __init__(
        self,
        plan: Plan,
        readers: Mapping[str, TokenReader],
        vocab: Vocabulary,
        *,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        ahead: int = 4,
        padded: bool = False,
    ) -> None:
        self.plan, self.readers, self.vocab = plan, readers, vocab
        self.state, self.rank, self.world, self.padded = state, rank, world, padded
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="moma-loader", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            for micro_batch, state in self.plan.run(self.state):
                if micro_batch.number % self.world == self.rank:
                    shape = self.plan.shape
                    self._put((build_batch(micro_batch, self.readers, shape, self.vocab, self.padded), state))
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

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()
