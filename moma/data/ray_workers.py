"""Chunks -> shards by Ray Data: the workers of one machine or of a whole Ray cluster.

    one listing task --stream of chunks--> actors, each with its tokenizers --records--> this process

Chunks are streamed: Ray's own limits on memory hold the listing back. An actor or a machine that is lost costs the
chunks it had, which Ray hands to another; shards are written whole or not at all, so a repeated one changes nothing.
On several machines the corpus and the raw data lie on a folder that all of them see under the same (absolute) path,
and moma is installed on each. Ray's usage reports are off, and a local Ray is started without dashboard in a folder
of its own, which is removed.
"""

import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from moma.data.chunks import Chunk
from moma.data.workers import Setup, make_shard, start_worker

_RETRIES = 3  # of one chunk, when its worker is lost


@contextmanager
def ray_session(workers: int, address: str | None) -> Iterator[Any]:
    """The module `ray`, connected: to the cluster at `address` ("auto": the one that this machine belongs to), or
    (None) to a Ray of this machine alone for `workers` (0: one per core), which ends with the session.

    A connection that there is already is used and kept. ValueError without the package.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("got no package 'ray', need it for engine=ray: pip install 'moma[data]'") from error
    if ray.is_initialized():
        yield ray
        return
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {"address": address}
        if not address:
            cores = workers or len(os.sched_getaffinity(0))
            # One more than the workers': the listing and Ray's own actors need room.
            options = {"address": "local", "num_cpus": cores + 1, "include_dashboard": False, "_temp_dir": folder}
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield ray
        finally:
            ray.shutdown()


def in_ray(
    ray: Any, list_chunks: Callable[[], Iterator[Chunk]], setup: Setup, workers: int
) -> Generator[dict[str, Any], None, None]:
    """Make a shard of every chunk that `list_chunks` (called in a Ray task) gives; their records as they come.

    `ray` of a `ray_session`; `workers` 0: one per core or, with `device` cuda, one per GPU. ValueError as raised by a
    worker, and for a chunk that kills its worker again and again.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a chunk is a block: it goes to a worker as soon as it is listed
    gpu = setup.device.startswith("cuda")
    have = ray.cluster_resources()
    workers = workers or int(have.get("GPU", 0) if gpu else have.get("CPU", 1) - 1) or 1

    def listed(_: Any) -> Iterator[dict[str, list[bytes]]]:
        for chunk in list_chunks():
            yield {"chunk": [pickle.dumps(chunk)]}

    # A tenth of a core: the listing must find room beside workers on every core.
    chunks = ray.data.from_items([0]).map_batches(listed, batch_size=None, num_cpus=0.1)
    records = chunks.map(
        _Maker,
        fn_constructor_args=(setup,),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
        ray_remote_args_fn=lambda: {"max_task_retries": _RETRIES},
    )
    try:
        for row in records.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield json.loads(row["record"])
    except ray.exceptions.RayActorError as error:
        raise ValueError(
            f"got a chunk that killed its worker {_RETRIES + 1} times (out of memory?), need workers that live "
            f"({error}): start the same command again with fewer workers; finished shards are kept"
        ) from error


class _Maker:
    """What Ray keeps alive between chunks: the loaded tokenizers."""

    def __init__(self, setup: Setup) -> None:
        self._worker = start_worker(setup)

    def __call__(self, row: dict[str, bytes]) -> dict[str, str]:
        try:
            # Of our own listing task, as Ray itself passes objects.
            record = make_shard(pickle.loads(row["chunk"]), self._worker)
        except ValueError as error:  # as a value: Ray would wrap it, and try the chunk again
            return {"record": "", "error": str(error)}
        return {"record": json.dumps(record), "error": ""}
