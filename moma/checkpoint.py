"""Checkpoints of one's own runs: a directory of DCP shards and `meta.json`, complete or not there at all.

    <root>/step-00000100/        __0_0.distcp ...  .metadata    tensors (torch.distributed.checkpoint)
                                 meta.json                      everything that is not a tensor, written last
    <root>/.tmp-step-00000200/   a save that a kill cut off; the next save removes it

A save goes to the temporary name, every file and the folder are fsynced, then one rename makes it a
checkpoint. Works with and without a process group: with one, every rank calls `save` and `load`, and any
world size may load. State is a dict of tensors, nested at will: `{"model": model_state(model), "optimizer":
optimizer_state(...)}`. Numbers, names and the configuration go into `meta`, which is JSON.

    training   step | copy | step | step | step ...         the pause is the copy (`Saver.save`)
    thread                 | write, fsync, rename, remove   of what the copy holds

`Saver` writes while training goes on, `save` before it returns. A write that fails leaves the checkpoints before
it and says what it needed; `Keep` says which of them stay. Tensors that do not fit into memory together are
written one by one by `save_lazily` and read one by one by `open_group`.

`alone(run_dir)` keeps a second process out of a folder while the first one writes to it.

Refuses a checkpoint that is cut short or of other names, shapes or dtypes, and a `.metadata` (DCP writes it
as a pickle) that names anything but the few classes which describe tensors: reading one runs no code of its
own. The tensors are read by `torch.load(weights_only=True)`.
"""

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

TMP = ".tmp-"
FORMAT = 2
LOCK = ".lock"
_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"
# All that `.metadata` names for plain and for sharded tensors; calling any of them does nothing but make a value.
_ALLOWED = {
    (_DESCRIPTIONS, "Metadata"),
    (_DESCRIPTIONS, "TensorStorageMetadata"),
    (_DESCRIPTIONS, "TensorProperties"),
    (_DESCRIPTIONS, "ChunkStorageMetadata"),
    (_DESCRIPTIONS, "MetadataIndex"),
    (_DESCRIPTIONS, "StorageMeta"),
    (_DESCRIPTIONS, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers by name: loading into them loads the model."""
    return cast(dict[str, Tensor], get_model_state_dict(model))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's own state tensors by parameter name, step counters included (no copies).

    A fresh optimizer gets its zero state first, so this is also what to load into. Hyperparameters are not
    part of it: they come from the configuration. Raises ValueError when a fresh optimizer already has
    gradients.
    """
    fresh = not optimizer.state
    if fresh and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("got a fresh optimizer with gradients, need none: call it before backward or after a step")
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    state = {key: cast(Tensor, value) for key, value in flat.items() if key.startswith("state.")}
    if fresh:  # torch made the state by a step with zero gradients, which also counted one
        for value in state.values():
            value.zero_()
    return state


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last` (0: all), those of every `every`-th step, the one of the lowest
    `meta["val_loss"]`."""

    last: int = 2
    every: int | None = None  # steps; None: none for its number
    best: bool = False

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ValueError(f"got keep_last={self.last}, need 0 (keep all) or more: change checkpoint.keep_last")
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"got keep_every={self.every} steps, need at least 1, or null: change checkpoint.keep_every"
            )


def save(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any], keep_last: int) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep_last` (0 keeps all); returns its
    folder.

    Raises ValueError for a state that holds anything but tensors, or when this step has its checkpoint
    already; OSError when it cannot be written.
    """
    keep, tensors = Keep(keep_last), dict(_flatten(state))

    def write(folder: Path) -> None:
        _write(tensors, _Writer(folder, sync_files=True), DefaultSavePlanner(), None)

    _commit(root, step, write, _n_bytes(tensors), meta, keep, None)
    return _folder(root, step)


class Saver:
    """Checkpoints of a run in training: `save` copies the state and returns, a thread writes the copy.

    With a process group every rank makes one, and calls `save`, `wait` and `close` alike; what the threads tell each
    other goes through a group of their own, so it never mixes with the training's. Close it when done, before the
    process group.

    A process keeps one copy of the part of the state that it holds, pinned where that is on a GPU, and uses its memory
    again: 12 bytes per parameter for fp32 weights and both moments of AdamW, 8 with moments in bf16. (torch may round
    pinned memory up to a power of two per tensor.) A write that fails is removed, and raised by the next `save`, `wait`
    or `close`.

    pause_s    seconds that the last `save` took: the copy, and the rest of the write before it if there was one
    write_s    seconds of the last write, up to the new name and the removal of older checkpoints
    bytes      of its files, all ranks together
    """

    def __init__(self, root: Path, keep: Keep) -> None:
        self.root, self.keep = root, keep
        self.pause_s, self.write_s, self.bytes = 0.0, 0.0, 0
        self._copies: dict[str, Tensor] = {}
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if _distributed() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moma-saver")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`; tensors and `meta` may change as soon as this returns.

        Raises what the write before it raised, and ValueError for a state that holds anything but tensors, or when
        this step has its checkpoint already.
        """
        begin = time.perf_counter()
        self.wait()
        tensors = dict(_flatten(state))
        _refuse_second(self.root, step)
        self._copy(tensors)
        record = json.loads(json.dumps(meta, allow_nan=False))
        self._writing = self._thread.submit(self._write, step, tensors, record)
        self.pause_s = time.perf_counter() - begin

    def wait(self) -> None:
        """Return when nothing is being written any more: the checkpoint has its name, for every rank.

        Raises OSError when it could not be written.
        """
        if self._writing is not None:
            try:
                self._writing.result()
            finally:
                if self._writing.done():  # not when the wait was interrupted
                    self._writing = None

    def close(self) -> None:
        """`wait`, then give back thread, memory and process group."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copies.clear()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """This process's part of every tensor into its own place in CPU memory; waits for the device once."""
        on_gpu = False
        for name, tensor in tensors.items():
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (part.shape, part.dtype):
                copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self._copies[name] = copy
            copy.copy_(part.detach(), non_blocking=True)
            on_gpu = on_gpu or part.is_cuda
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()

    def _write(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        begin = time.perf_counter()

        def write(folder: Path) -> None:
            # Nothing to copy ahead: the default would bring this thread a CUDA context of its own.
            writer = _Writer(folder, sync_files=True, per_thread_copy_ahead=0)
            _write(tensors, writer, _CopyPlanner(self._copies), self._group)

        self.bytes = _commit(self.root, step, write, _n_bytes(tensors), meta, self.keep, self._group)
        self.write_s = time.perf_counter() - begin


class _CopyPlanner(DefaultSavePlanner):
    """Plans by the tensors themselves, their shapes and how they are shared out; writes the copies."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        copy = self.copies[write_item.index.fqn]
        assert write_item.tensor_data is not None and copy.shape == write_item.tensor_data.chunk.sizes
        return copy


class Lazy(NamedTuple):
    """A tensor that is made when its turn to be written comes: `fetch()` returns it, on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]


def save_lazily(root: Path, step: int, tensors: Mapping[str, Lazy], meta: dict[str, Any]) -> Path:
    """`save` of one process for tensors by path ("model/head.weight") of which two at a time are in memory.

    A ValueError of a `fetch` leaves no checkpoint and is raised as it is.
    """
    empty = {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in tensors.items()}

    def write(folder: Path) -> None:
        # A file for every tensor: DCP's writer holds on to all tensors of a file until the file is whole.
        writer = _Writer(folder, single_file_per_rank=False, sync_files=True)
        _write(empty, writer, _LazyPlanner(tensors), None)

    _commit(root, step, write, _n_bytes(empty), meta, Keep(last=0), None)
    return _folder(root, step)


class _LazyPlanner(DefaultSavePlanner):
    """Plans by shapes on the meta device, fetches a tensor when it is written."""

    def __init__(self, tensors: Mapping[str, Lazy]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        lazy = self.tensors[write_item.index.fqn]
        tensor = lazy.fetch()
        assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), write_item.index.fqn
        return tensor


class _Writer(FileSystemWriter):
    """DCP's writer, which hides what the system said behind an error about positions in an archive."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def _write(
    tensors: Mapping[str, Tensor],
    writer: _Writer,
    planner: DefaultSavePlanner,
    group: dist.ProcessGroup | None,
) -> None:
    """Let DCP write the tensors; what one rank's write raised is raised on all."""
    _quiet()
    try:
        dcp_save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=not _distributed())
    except CheckpointException as error:
        first = min(error.failures)
        raise error.failures[first][0] from None


def _commit(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    n_bytes: int,
    meta: dict[str, Any],
    keep: Keep,
    group: dist.ProcessGroup | None,
) -> int:
    """Let `write` put the tensors into a folder under a temporary name, add `meta.json`, make it a checkpoint.

    Returns the bytes of its files. What fails on one rank is raised on all.
    """
    _refuse_second(root, step)
    folder = _folder(root, step)
    temporary = root / f"{TMP}{folder.name}"

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{TMP}*"):
            _remove(leftover)
        temporary.mkdir()

    def finish() -> int:
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        record = {"format": FORMAT, "step": step, **meta, "files": sizes}
        (temporary / "meta.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        _fsync(temporary / "meta.json")
        _fsync(temporary)
        temporary.rename(folder)
        _fsync(root)
        for old in _superfluous(root, keep):
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a real
            # name.
            _remove(old.rename(root / f"{TMP}{old.name}"))
        return sum(sizes.values())

    try:
        _on_first(prepare, group)
        write(temporary)
        return _on_first(finish, group)
    except Exception as error:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError):
            raise OSError(_unwritten(root, step, n_bytes, error)) from error
        raise


def _unwritten(root: Path, step: int, n_bytes: int, error: Exception) -> str:
    """What to say of a checkpoint that could not be written: what it takes, and where the run stands without it."""
    there = next(path for path in (root.absolute(), *root.absolute().parents) if os.path.isdir(path))
    free, last = shutil.disk_usage(there).free, latest(root)
    alive = ", and every process alive until it is written" if _distributed() else ""
    after = f"it goes on from {last.name}, the last whole one" if last else "it starts over, there is no whole one yet"
    return (
        f"got no checkpoint of step {step} in {root} ({str(error).splitlines()[0]}), need {_mib(n_bytes)} free there "
        f"({_mib(free)} are) and the right to write{alive}: make room or give the right, then run the same command: "
        f"{after}"
    )


def _mib(n_bytes: int) -> str:
    return f"{math.ceil(n_bytes / 2**20)} MiB"


_T = TypeVar("_T")


def _on_first(work: Callable[[], _T], group: dist.ProcessGroup | None) -> _T:
    """What `work` returns or raises on the first rank, which alone does it: the same on every rank, not before."""
    outcome: list[Any] = [None]
    if _rank() == 0:
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    if _distributed():
        dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _superfluous(root: Path, keep: Keep) -> list[Path]:
    """The checkpoints that need not stay; never the newest."""
    there = _complete(root)
    if not keep.last:
        return []
    kept = set(there[-keep.last :])
    if keep.every:
        kept |= {path for path in there if _step(path) % keep.every == 0}
    losses = {path: loss for path in there if (loss := _val_loss(path)) is not None} if keep.best else {}
    if losses:
        kept.add(min(losses, key=lambda path: (losses[path], _step(path))))
    return [path for path in there if path not in kept]


def _val_loss(path: Path) -> float | None:
    try:
        loss = read_meta(path).get("val_loss")
    except (OSError, ValueError):  # a damaged one is for those who load it
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def _remove(path: Path) -> None:
    """Remove a folder that no one needs; one that stays takes room and does no harm."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed ({error}): remove it by hand", stacklevel=2)


def _refuse_second(root: Path, step: int) -> None:
    if (folder := _folder(root, step)).exists():
        raise ValueError(f"got a second checkpoint of step {step}, need one: resume from {folder} or remove it")


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of all tensors, each one whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def latest(root: Path) -> Path | None:
    """The folder of the newest complete checkpoint, None if there is none."""
    complete = _complete(root)
    return complete[-1] if complete else None


def by_step(root: Path) -> dict[int, Path]:
    """The folders of all complete checkpoints by step, the newest last."""
    return {_step(path): path for path in _complete(root)}


def read_meta(path: Path) -> dict[str, Any]:
    """What `save` got as `meta`, with `step`, `format` and `files`; ValueError if missing or damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"got {path} without meta.json, need a checkpoint folder (.../step-00000100)") from None
    except ValueError as error:
        raise ValueError(f"got a damaged {path / 'meta.json'} ({error}): remove {path}, resume from before") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"got {path} of format {meta.get('format')}, need {FORMAT}: use the moma that wrote it")
    return meta


def load(path: Path, state: dict[str, Any]) -> None:
    """Copy a checkpoint into the tensors of `state`, in place.

    Strict: within each top-level group of `state` names, shapes and dtypes must be those of the checkpoint. A
    group not asked for (say the optimizer, for evaluation) is left alone. Raises ValueError.
    """
    wanted, stored = dict(_flatten(state)), _stored(path)
    stored = {name: entry for name, entry in stored.items() if name.split("/", 1)[0] in state}
    for names, what in (
        (wanted.keys() - stored.keys(), "lacks"),
        (stored.keys() - wanted.keys(), "also holds"),
    ):
        if names:
            raise ValueError(
                f"got {path}, which {what} {len(names)} tensors such as {min(names)}, need the same names: "
                f"build the model and the optimizer as in its meta.json"
            )
    for name, tensor in wanted.items():
        have = (tuple(stored[name].size), stored[name].properties.dtype)
        if have != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"got {name} as {_form(*have)} in {path}, need {_form(tuple(tensor.shape), tensor.dtype)}: "
                f"build the model and the optimizer as in its meta.json"
            )
    _read(path, wanted)


def read_tensors(path: Path, group: str) -> dict[str, Tensor]:
    """All tensors of one top-level group ("model") on the CPU, whole, without building a model first."""
    group_of = open_group(path, group)
    tensors = {f"{group}/{name}": torch.empty(lazy.shape, dtype=lazy.dtype) for name, lazy in group_of.items()}
    _read(path, tensors)
    return {name.removeprefix(f"{group}/"): tensor for name, tensor in tensors.items()}


def open_group(path: Path, group: str) -> dict[str, Lazy]:
    """The tensors of one top-level group ("model") by name, each read from its file when it is fetched."""
    prefix = f"{group}/"
    entries = {name: entry for name, entry in _stored(path).items() if name.startswith(prefix)}
    if not entries:
        raise ValueError(f"got {path} without the group {group!r}, need a checkpoint that holds it")

    def lazy(name: str, entry: TensorStorageMetadata) -> Lazy:
        def fetch() -> Tensor:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            _read(path, {name: tensor})
            return tensor

        return Lazy(tuple(entry.size), entry.properties.dtype, fetch)

    return {name.removeprefix(prefix): lazy(name, entry) for name, entry in entries.items()}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and hold its lock (`.lock` in it), so that one process at a time writes there.

    A killed process lets go of it by itself. On the way out the lock file goes, and a folder that this made
    too if nothing else is in it. With several ranks, rank 0 alone enters. Raises ValueError when another
    process holds it; warns where the file system has no locks.
    """
    path = folder / LOCK
    made = not folder.exists()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the one before has just removed the empty folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"got a second process in {folder}, need one at a time: wait for it or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} is not locked ({error}): start one process at a time in it", stacklevel=3)
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the one before removed this file after we opened it: its lock protects nothing
    try:
        yield
    finally:
        # Removed while it is held, and only if it is ours still: nobody can lose a lock to this.
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                if made:
                    folder.rmdir()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class _Foreign(ValueError):
    """A pickle that names something outside of `_ALLOWED`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise _Foreign(f"{module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Enum:
    """What `getattr` may do in a pickle: Python 3.11.2 writes members of enumerations so."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _Foreign("builtins.getattr")
    return kind[name]


class _Reader(FileSystemReader):
    """DCP's reader, which would unpickle whatever `.metadata` names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except _Foreign as error:
                raise _Foreign(
                    f"got {path} that names {error}, need only what describes tensors: it is no checkpoint of "
                    "moma and may be harmful, do not load it"
                ) from None
        if not isinstance(metadata, Metadata):
            raise TypeError(f"{type(metadata).__name__} instead of Metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _flatten(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            raise ValueError(f"got a {type(value).__name__} at {prefix}{name}, need a tensor: put it into meta")


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes by name, once every file is known to be there in full length."""
    for name, size in read_meta(path)["files"].items():
        have = (path / name).stat().st_size if (path / name).exists() else 0
        if have != size:
            raise ValueError(f"got {have} bytes in {path / name}, need {size}: remove {path}, resume from before")
    try:
        return _Reader(path).read_metadata().state_dict_metadata  # type: ignore[return-value]
    except _Foreign:
        raise
    except Exception as error:  # whatever unpickling a damaged file may raise
        raise _damaged(path, error) from error


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    _quiet()
    try:
        dcp_load(tensors, storage_reader=_Reader(path), no_dist=not _distributed())
    except (CheckpointException, RuntimeError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"got a damaged {path} ({type(error).__name__}): remove it, resume from before")


def _quiet() -> None:
    """No warning of DCP at every save and load that there is no process group: normal here.

    For good, since `catch_warnings` is not for threads.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = (p for p in root.iterdir() if re.fullmatch(r"step-\d{8,}", p.name) and (p / "meta.json").exists())
    return sorted(found, key=_step)


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
