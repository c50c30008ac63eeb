"""What a run is: its configuration, the fields that make it this run and no other, its plan and its held-out data.

A run folder holds one run. Identity fields (what the numbers depend on) must be the same to go on with it; the rest may
change. A run may start from the parameters of another one, or of a file of `moma export`. The loop is in `train.py`.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moma import checkpoint
from moma.config import Composed, Duration, kind_field
from moma.config import diff as config_diff
from moma.data.batch import Batch, build_batch
from moma.data.plan import Plan, PlanShape
from moma.data.shards import ShardedSource, corpus_hash, open_corpus
from moma.distributed import ParallelConfig
from moma.export import open_parameters
from moma.log import LogConfig
from moma.modality import Vocabulary
from moma.model.attention import ATTENTIONS, AttentionConfig, SharedAttentionConfig
from moma.model.depth import DEPTHS, DepthConfig, FullDepthConfig
from moma.model.feed_forward import FEED_FORWARDS, FeedForwardConfig, SparseConfig
from moma.model.flops import aux_flops, parts_of, totals
from moma.model.transformer import ARCHITECTURE, Architecture, ModelConfig, Transformer
from moma.objectives import OBJECTIVES, AuxRoutersConfig, NextTokenConfig, is_aux
from moma.optim import OptimConfig
from moma.trace import ProfileConfig

IDENTITY = (
    *ARCHITECTURE, "objective", "data", "optim", "seed", "precision", "init_from", "vocab_hash", "plan",
)  # fmt: skip


@dataclass(frozen=True)
class StageConfig:
    """A mixture that holds from a point of the training on, to the next stage or the end."""

    at: Duration
    mixture: dict[str, float]


@dataclass(frozen=True)
class DataConfig:
    """Corpus and micro-batch shape (rows x row_length with exactly `images` images): part of the model."""

    corpus: Path
    rows: int
    row_length: int
    images: int
    accumulation: int = 1  # micro-batches per optimizer step
    mixture: dict[str, float] = field(default_factory=dict)  # weight per source; empty: by size
    stages: tuple[StageConfig, ...] = ()  # other mixtures later in the training
    balance: bool = True  # false: `images` on average alone, the baseline that constant counts are measured against

    def __post_init__(self) -> None:
        PlanShape(self.rows, self.row_length, self.images)
        if self.accumulation < 1:
            raise ValueError(f"got accumulation={self.accumulation}, need at least 1 micro-batch per step")

    @property
    def shape(self) -> PlanShape:
        return PlanShape(self.rows, self.row_length, self.images)

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.row_length * self.accumulation

    def stage_starts(self, total: int, flops_per_token: float) -> list[tuple[int, dict[str, float]]]:
        """First micro-batch and mixture of every stage of a run of `total` steps; ValueError unless they rise in it."""
        steps = [stage.at.to_steps(self.tokens_per_step, flops_per_token, total) for stage in self.stages]
        if steps != sorted(set(steps)) or any(not 0 < step < total for step in steps):
            raise ValueError(
                f"got data.stages that begin after steps {steps} of {total}, need rising steps inside the run: correct "
                "data.stages or duration"
            )
        return [(step * self.accumulation, stage.mixture) for step, stage in zip(steps, self.stages, strict=True)]

    def modality_shares(self, vocab: Vocabulary) -> tuple[float, ...]:
        """Share of text and image tokens, constant, or on average without `balance`; further modalities count as text
        here. Raises ValueError for more images than fit."""
        image = self.images * vocab.tokens_per_image / (self.rows * self.row_length)
        if image > 1:
            raise ValueError(
                f"got data.images={self.images} of {vocab.tokens_per_image} codes in {self.rows} x {self.row_length} "
                "tokens, need as many as fit: lower data.images, or raise data.rows or data.row_length"
            )
        return (1 - image, image, *([0.0] * len(vocab.extra_modalities)))


@dataclass(frozen=True)
class SeedConfig:
    """`data` orders documents, `init` draws parameters and routing noise: paired runs share them."""

    data: int = 0
    init: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training: how often (null: never) and over how many micro-batches."""

    interval: Duration | None = None
    batches: int = 8

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"got batches={self.batches}, need at least 1: interval=null turns evaluation off")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save, and which stay: the newest `keep_last` (0: all), those at multiples of `keep_every`, the one
    with the lowest validation loss. The end of a run is always saved."""

    interval: Duration = Duration(steps=1000)
    keep_last: int = 2
    keep_every: Duration | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        checkpoint.Keep(self.keep_last)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `moma train` reads."""

    model: ModelConfig
    feed_forward: FeedForwardConfig = kind_field(FEED_FORWARDS)
    attention: AttentionConfig = kind_field(ATTENTIONS, default=SharedAttentionConfig(), kw_only=True)
    depth: FullDepthConfig | DepthConfig = kind_field(DEPTHS, default=FullDepthConfig(), kw_only=True)
    objective: NextTokenConfig | AuxRoutersConfig = kind_field({k: v[0] for k, v in OBJECTIVES.items()})
    data: DataConfig = field(kw_only=True)
    tokenizer: str = field(kw_only=True)  # name of a folder in tokenizers/, or a path
    duration: Duration = field(kw_only=True)
    optim: OptimConfig = field(kw_only=True)
    seed: SeedConfig = SeedConfig()
    max_skipped: int = 10  # steps of a run that may be left out because a loss or a gradient was not finite
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    run_dir: Path | None = None  # null: runs/ and the choices
    init_from: Path | None = None  # run, or file of `moma export`, whose parameters this one starts from

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.model, self.feed_forward, self.attention, self.depth)


def default_run_dir(composed: Composed) -> Path:
    """runs/<data>/<model>-<feed_forward>[-<attention>][-<depth>][-<objective>]-s<seed>: the choices, no timestamp."""
    config, choices = composed.config, composed.choices
    parts = [choices["model"], choices["feed_forward"]]
    parts += [choices["attention"]] if choices["attention"] != "shared" else []
    parts += [choices["depth"]] if choices["depth"] != "full" else []
    parts += [choices["objective"]] if choices["objective"] != "next_token" else []
    seed = f"s{config.seed.init}" + (f"d{config.seed.data}" if config.seed.data != config.seed.init else "")
    return Path("runs") / choices["data"] / "-".join([*parts, seed])


def training_plan(config: TrainConfig, sources: dict[str, ShardedSource], vocab: Vocabulary) -> Plan:
    """The plan of a run; ValueError for stages that are not inside it and mixtures that cannot give `images`."""
    data, stages = config.data, []
    if data.stages:
        per_token = training_flops(config, vocab)
        stages = data.stage_starts(config.duration.to_steps(data.tokens_per_step, per_token, None), per_token)
    return Plan(sources, data.shape, config.seed.data, data.mixture, stages=stages, balance=data.balance)


def training_flops(config: TrainConfig, vocab: Vocabulary) -> float:
    """FLOPs per token of a step, without building the model."""
    with torch.device("meta"):
        model = Transformer(config.architecture, vocab.size, vocab.modalities, config.objective.needs_aux_routers)
    shares = config.data.modality_shares(vocab)
    return step_flops(
        config.objective, totals(parts_of(model, config.data.row_length, shares)), aux_flops(model, shares)[1]
    )


def identity_of(
    resolved: dict[str, Any], precision: str, vocab: Vocabulary, plan: Plan, corpus: Path
) -> dict[str, Any]:
    """The configuration of a run with everything its numbers depend on filled in."""
    facts = {"precision": precision, "vocab_hash": vocab.hash}
    return {**resolved, **facts, "plan": plan.identity(corpus_hash(corpus, "train"), vocab.hash)}


def provenance(identity: dict[str, Any], git: dict[str, Any]) -> dict[str, Any]:
    """What every checkpoint says of the run and the software that made it."""
    return {
        "config": identity,
        "git": git,
        "vocab_hash": identity["vocab_hash"],
        "precision": identity["precision"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def step_flops(objective: NextTokenConfig | AuxRoutersConfig, flops: dict[str, float], aux_training: float) -> float:
    """FLOPs per token of what a step runs: forward and backward are 3 x forward, frozen parts run forward alone.

    Training the auxiliary routers of a finished model needs no loss head.
    """
    if objective.trains_model:
        return flops["flops_per_token_train"] + (aux_training if objective.needs_aux_routers else 0)
    return flops["flops_per_token_forward"] - flops["flops_per_token_head"] + aux_training


def has_noise(config: TrainConfig, meta: dict[str, Any]) -> bool:
    """Whether Gumbel-sigmoid noise is on in the pre-training: `upcycled` is for runs that began by upcycling."""
    sparse = config.feed_forward
    wanted = isinstance(sparse, SparseConfig) and (
        sparse.noise == "gumbel" or (sparse.noise == "upcycled" and bool(meta.get("upcycled")))
    )
    return wanted and config.objective.trains_model


def check_identity(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Raise ValueError with the differences if a run folder holds another run."""
    changed, _ = config_diff(before, now, IDENTITY)
    if changed:
        lines = "; ".join(changed)
        raise ValueError(
            f"got a configuration that is not the one of {run_dir} ({lines}), need the same to resume: "
            "set another run_dir, or remove the folder to start over"
        )


def load_parameters(model: Transformer, source: Path, identity: dict[str, Any], new_aux: bool) -> int:
    """Copy the parameters of a run's newest checkpoint, or of a file of `moma export`; only auxiliary routers may be
    new. Returns the step they are of.

    Raises ValueError unless the run has the same model, feed-forward and vocabulary, and, for auxiliary routers, the
    same micro-batch: routing runs over it, so it is part of the model.
    """
    tensors, record = open_parameters(source)
    fields = ("vocab_hash", *ARCHITECTURE)
    fields += ("data.rows", "data.row_length", "data.images") if new_aux else ()
    changed, _ = config_diff(record["config"], identity, fields)
    if changed:
        raise ValueError(
            f"got init_from={source} of another model ({'; '.join(changed)}), need the same: use its overrides"
        )
    own = model.state_dict()
    missing = sorted(n for n in own.keys() - tensors.keys() if not (new_aux and is_aux(n)))
    extra = sorted(tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or extra or shapes:
        first = [*missing, *extra, *shapes][0]
        raise ValueError(
            f"got init_from={source} whose parameters differ from this model's ({first} and "
            f"{len(missing) + len(extra) + len(shapes) - 1} more), need the same model and feed_forward: "
            "use its overrides"
        )
    with torch.no_grad():
        for name, lazy in tensors.items():  # one at a time in memory
            own[name].copy_(lazy.fetch())
    return record["step"]


def require_held_out(corpus: Path, vocab: Vocabulary, remedy: str = "eval.interval=null") -> None:
    """Raise ValueError where a corpus has no held-out document; `remedy`: the setting that needs none."""
    if not any(source.n_documents for source in open_corpus(corpus, "val", vocab.hash).values()):
        raise ValueError(
            f"got no held-out document in {corpus}, need some to evaluate: prepare it with val_fraction above 0, or "
            f"set {remedy}"
        )


def validation_batches(
    corpus: Path, vocab: Vocabulary, data: DataConfig, limit: int | None, device: torch.device
) -> Iterator[Batch]:
    """Held-out micro-batches of the training shape: one pass over every source of the mixture, in a fixed order.

    The same ones throughout a run, of its first mixture: `stages` and `balance` do not touch them.
    """
    sources = dict(open_corpus(corpus, "val", vocab.hash))
    shape, mixture = data.shape, {name: weight for name, weight in data.mixture.items() if name in sources}
    plan = Plan(sources, shape, seed=0, mixture=mixture, passes=1)
    for micro_batch, _ in plan.run():
        if limit is not None and micro_batch.number >= limit:
            return
        yield build_batch(micro_batch, sources, shape, vocab).to(device)


def git_state() -> dict[str, Any]:
    """Commit and whether the tree was clean; empty outside a checkout."""
    checkout = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != checkout:  # moma installed inside another project
            return {}
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return {}
