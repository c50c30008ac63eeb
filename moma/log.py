"""What a run reports: `metrics.jsonl` always, Weights & Biases as its mirror, progress on the console.

    {"step": 10, "loss": 5.43, "lr": 0.0001, ...}    one line per step; keys from METRICS, finite or null

The file is the record; `analysis/` reads nothing else. Every checkpoint carries the file's length
(`offset()`), and a resumed run cuts the file there, so no step stands twice. A name that METRICS lacks is an
error: a number nobody can look up is of no use. Imports no torch; pass plain numbers, so that the moment of
waiting for a device is the caller's.
"""

import difflib
import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

WANDB_WAIT_S = 30.0  # for the server's first answer

# name -> "unit: meaning". {x} stands for one name without a slash; {router}: `3` (experts of layer 3),
# `3.depth`. "nats" is per target token.
METRICS = {
    "loss": "nats: training cross-entropy over all targets of the step, without z-loss and auxiliary losses",
    "loss_text": "nats: cross-entropy of text targets, structural tokens (BOI, EOI, EOS) included",
    "loss_text_plain": "nats: cross-entropy of text targets without structural tokens",
    "loss_image": "nats: cross-entropy of image targets",
    "loss_{modality}": "nats: cross-entropy of the targets of a further modality",
    "z_loss": "weighted: squared log-partition term added to the loss",
    "aux_loss": "nats: binary cross-entropy of the auxiliary routers, per routed token and expert",
    "balance_loss": "weighted: load-balancing loss of token choice added to the loss, summed over layers and groups",
    "router_z_loss": "weighted: squared log-partition of token choice added to the loss, summed over layers and groups",
    "loss_source/{source}": "nats: cross-entropy of the targets of one source",
    "grad_norm": "1: global L2 norm of the gradient before clipping",
    "grad_norm/{part}": "1: L2 norm of the gradient of one part of the model before clipping, on the logged step",
    "skipped_steps": "steps: left out so far because a loss or a gradient was not finite",
    "lr": "1: learning rate of the step",
    "micro_batches": "micro-batches: consumed by the run so far; the plan says which documents they hold",
    "tokens": "tokens: consumed by the run so far",
    "flops": "FLOPs: training FLOPs of the run so far",
    "tokens_per_second": "tokens/s: over the window since the last line, evaluation and checkpoints left out",
    "mfu_full": "1: model FLOPs utilisation, attention counted in full",
    "mfu_causal": "1: model FLOPs utilisation, causal half of attention counted",
    "memory_gib": "GiB: most that the first process has held so far (of a GPU's memory, else of the host's)",
    "checkpoint_pause_s": "s: that the last checkpoint held the training up",
    "checkpoint_write_s": "s: that the last finished checkpoint took to be written, beside the training",
    "data_wait_s": "s: waiting for data in the window since the last line",
    "time/{kind}_s": "s: of the whole run, by kind of work",
    "val_loss": "nats: validation cross-entropy over all targets; all val_ numbers route as in training",
    "val_loss_text": "nats: validation cross-entropy of text targets, structural tokens included",
    "val_loss_text_plain": "nats: validation cross-entropy of text targets without structural tokens",
    "val_loss_image": "nats: validation cross-entropy of image targets",
    "val_loss_{modality}": "nats: validation cross-entropy of the targets of a further modality",
    "val_threshold_loss": "nats: validation cross-entropy, routed causally by moving cut-offs; so all val_threshold_",
    "val_threshold_loss_text": "nats: the same of text targets, structural tokens included",
    "val_threshold_loss_text_plain": "nats: the same of text targets without structural tokens",
    "val_threshold_loss_image": "nats: the same of image targets",
    "val_threshold_loss_{modality}": "nats: the same of the targets of a further modality",
    "data/{source}/passes": "epochs: passes over one source so far",
    "data/{source}/tokens": "tokens: taken from one source so far",
    "data/{source}/share": "1: share of one source in the tokens so far",
    "router/{router}/unserved_{modality}": "1: share of a router's tokens of a modality that no expert of it computes",
    "router/{router}/single_{modality}": "1: share of these tokens that exactly one expert computes",
    "router/{router}/several_{modality}": "1: share of these tokens that two or more experts compute",
    "router/{router}/picks_{modality}": "experts: mean number of routed experts per token of a modality",
    "router/{router}/score_{modality}": "1: mean score of the chosen tokens of a modality",
    "router/{router}/entropy_{modality}": "1: entropy of the experts' loads over its maximum (1: equal loads)",
    "router/{router}/dropped_{modality}": "1: share of a modality's choices that a capacity refused",
    "router/{router}/similarity_{modality}": "1: mean cosine similarity of the weights of two experts of a group",
    "router/{router}/grad_norm": "1: L2 norm of a main router's gradient before clipping, on the logged step",
    "l1": "1: mean absolute error of reconstructed pixels in [-1, 1] (image tokenizer)",
    "perceptual": "1: distance of picture features (image tokenizer)",
    "quantizer": "weighted: codebook and commitment loss (image tokenizer)",
    "adversarial": "1: the generator's adversarial loss (image tokenizer)",
    "adaptive": "1: adaptive weight of the adversarial loss (image tokenizer)",
    "discriminator": "1: the discriminator's loss (image tokenizer)",
    "usage": "1: share of the codes used in a batch (image tokenizer)",
    "perplexity": "codes: exponential of the entropy of the codes in a batch (image tokenizer)",
    "psnr/{source}": "dB: held-out reconstructions, mean over a source's pictures (image tokenizer)",
    "ssim/{source}": "1: structural similarity of held-out reconstructions, mean over a source's pictures",
    "usage/{source}": "1: share of the codes used on held-out pictures",
    "perplexity/{source}": "codes: perplexity of the codes of held-out pictures",
    "aux/{router}/accuracy": "1: agreement of the auxiliary routers with the training rule",
}
# names (or their beginnings) that are read from clocks and gauges: all others are the same in every repetition
MEASURED = ("tokens_per_second", "mfu_", "memory_gib", "checkpoint_", "data_wait_s", "time/")
_PATTERN = re.compile("|".join(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name)) for name in sorted(METRICS, key=len)))


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides the file, and every how many steps. `entity`, `group`, `tags`: W&B's own."""

    kind: Literal["files", "wandb"] = "files"
    interval: int = 10
    project: str = "moma"
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"
    group: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"got log.interval={self.interval}, need at least 1 step: change it")


class RunLog:
    """The metrics of one run. One process writes: `writes=False` makes every method of the other ranks a
    no-op.

    `offset`: length of metrics.jsonl in the checkpoint resumed from, None at a fresh start (which empties the
    file: steps that no checkpoint holds are run again). `wandb_id`: from the checkpoint, so that W&B goes on
    with the run. Raises ValueError when the file is shorter than `offset`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        resolved: dict[str, Any],
        offset: int | None = None,
        wandb_id: str | None = None,
        writes: bool = True,
    ) -> None:
        self.wandb_id = wandb_id
        self._file = self._wandb = None
        if not writes:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        self._file = path.open("ab", buffering=0)  # a failed write leaves nothing behind that closing would write again
        size = self._file.tell()
        if size < (offset or 0):
            self._file.close()
            raise ValueError(
                f"got {path} of {size} bytes, need the {offset} of the checkpoint: restore it, or start anew"
            )
        self._file.truncate(offset or 0)
        self._file.seek(0, os.SEEK_END)
        if config.kind == "wandb":
            self._wandb = _start_wandb(run_dir, config, resolved, wandb_id)
            self.wandb_id = self._wandb.id

    def metrics(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append one line; a value that is not finite is written as null. Raises ValueError for an unknown
        name.

        W&B gets the same step numbers and ignores steps that it has: the same numbers, since training is
        deterministic.
        """
        for name in values:
            if not _PATTERN.fullmatch(name):
                close = difflib.get_close_matches(name, METRICS, 1)
                hint = f"did you mean {close[0]}? Else " if close else ""
                raise ValueError(f"got the metric {name!r}, need one of log.METRICS: {hint}add it there with its unit")
        if self._file is None:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                f"got {self._file.name} that cannot be written ({error.strerror}), need room for a line per step: make "
                "room, then run the same command: it goes on from the last checkpoint"
            ) from error
        if self._wandb is not None:
            try:
                self._wandb.log({name: line[name] for name in values if line[name] is not None}, step=step)
            except Exception as error:  # its service has died, in whatever way: the file is the record
                print(
                    f"W&B gets no more numbers of this run ({error}): they stand in {self._file.name}", file=sys.stderr
                )
                self._wandb = None

    def offset(self) -> int | None:
        """Bytes of metrics.jsonl, safely on disk, for the checkpoint; None where this process writes none."""
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Finish the file and the W&B run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(run_dir: Path, config: LogConfig, resolved: dict[str, Any], wandb_id: str | None) -> Any:
    """The run at W&B, which goes on offline where the server does not answer within WANDB_WAIT_S."""
    import wandb

    def start(mode: Literal["offline", "online"]) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            mode=mode,
            group=config.group,
            tags=config.tags,
            name=run_dir.name,
            dir=run_dir,
            config=resolved,
            id=wandb_id,
            resume="allow" if wandb_id else None,
            settings=wandb.Settings(init_timeout=WANDB_WAIT_S, finish_timeout=2 * WANDB_WAIT_S),
        )

    try:
        return start(config.mode)
    except wandb.Error as error:
        if config.mode == "offline":
            raise ValueError(f"got an error of W&B ({error}), need it to start: mend it, or set log=files") from error
        reason = str(error).splitlines()[0]
        print(
            f"W&B does not answer ({reason}): the run is logged offline, `wandb sync {run_dir}/wandb/offline-run-*` "
            "sends it later",
            file=sys.stderr,
        )
        wandb.teardown()
        return start("offline")


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def clock(seconds: float) -> str:
    """A duration for people: `42 s`, `1:02:03`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Progress:
    """Console progress: on a terminal one redrawn line, elsewhere a plain line every `interval_s` seconds."""

    def __init__(
        self, what: str, total: int, start: int = 0, interval_s: float = 10.0, stream: TextIO | None = None
    ) -> None:
        self._what, self._total, self._start, self._stream = what, total, start, stream or sys.stdout
        self._live = self._stream.isatty()
        self._interval_s = 0.1 if self._live else interval_s
        self._began = time.monotonic()
        self._shown = -math.inf

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of `total` are finished; too frequent calls are skipped, the last one never."""
        now = time.monotonic()
        if now - self._shown < self._interval_s and done < self._total:
            return
        self._shown = now
        rate = (now - self._began) / max(1, done - self._start)
        left = f"{clock(rate * (self._total - done))} left" if done > self._start else ""
        line = " | ".join(part for part in (f"{self._what} {done}/{self._total}", text, left) if part)
        self._stream.write(f"\r\x1b[2K{line}" if self._live else line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the redrawn line."""
        if self._live and self._shown > -math.inf:
            self._stream.write("\n")
