"""Upcycle: a dense or moe_1t1i run -> a sparse run at step 0 (MoMa section 2.5; Sparse Upcycling, arXiv 2212.05055).

    seed                                       target
    feed-forward of the layer (of a modality)  -> every expert of the group: copies, each with its own memory
    shared attention                           -> the same, or one copy per modality (untied)
    everything else, depth routers included    -> the same
    -                                          -> routers: initialised as from scratch, routing state 0

The target is a run folder whose checkpoint has step 0, an identity of its own and the seed's place in the data plan:
`moma train` with the same overrides resumes it. The learning rate starts over, the data goes on. An import
(`moma import_hf`) is a seed without data: its own start with the target.

At step 0 identical experts answer like the seed: exactly where their weights sum to 1 and nothing is dropped. In Swin
order the norm undoes the gates, so a token that any expert computes keeps its update up to the norm's eps; a token
that none computes loses it. `upcycle.json` holds what the target makes of held-out micro-batches beside the seed.

Refuses a target that differs from the seed in anything but feed-forward and attention (routing runs over
micro-batches: their shape is part of the model), and what has no exact copy: one mixed group from two different
feed-forwards, experts of another width, shared experts, shared attention from untied.
"""

import shlex
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moma import checkpoint
from moma.config import Composed, build, plain
from moma.config import diff as config_diff
from moma.data.batch import Batch
from moma.data.shards import open_corpus, write_json
from moma.distributed import choose_device
from moma.meter import Meter
from moma.modality import Vocabulary
from moma.model.attention import SharedAttentionConfig, UntiedAttentionConfig, document_mask
from moma.model.feed_forward import DenseConfig, FeedForwardConfig
from moma.model.loss import linear_cross_entropy
from moma.model.routing import SELECTIONS
from moma.model.transformer import ARCHITECTURE, Architecture, Transformer, build_model
from moma.objectives import NextTokenConfig, Tallies, freeze_for, is_aux, loss_tallies, router_tallies, routing_noise
from moma.optim import build_optimizer, learning_rate
from moma.run import (
    TrainConfig,
    default_run_dir,
    git_state,
    identity_of,
    provenance,
    require_held_out,
    training_flops,
    training_plan,
    validation_batches,
)
from moma.seeds import generator
from moma.tokenizer.vocab import asset_folder, load_vocabulary

SAME = (
    "model", "depth", "vocab_hash", "data.rows", "data.row_length", "data.images", "data.mixture", "seed.data", "plan",
)  # fmt: skip
SAME_AS_IMPORT = ("model", "depth", "vocab_hash")
CHUNK_TOKENS = 1024  # of logits compared at a time


@dataclass(frozen=True)
class UpcycleConfig(TrainConfig):
    """The target's training, as `moma train` reads it, and how its checkpoint is made of the seed's.

    `optimizer` keep: AdamW's moments and step counters of the copied tensors are copied along, routers start at 0.
    `copy_noise`: standard deviation of what is added to every copied expert but a group's first, as a share of each
    tensor's own. `report_batches`: held-out micro-batches on which seed and target are compared.
    """

    seed_run: Path = field(kw_only=True)
    optimizer: Literal["keep", "reset"] = "reset"
    copy_noise: float = 0.0
    report_batches: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.copy_noise < float("inf"):
            raise ValueError(f"got copy_noise={self.copy_noise}, need a number of 0 or more: 0 makes exact copies")
        if self.report_batches < 0:
            raise ValueError(f"got report_batches={self.report_batches}, need 0 (no comparison) or more")
        if not isinstance(self.objective, NextTokenConfig):
            raise ValueError(
                f"got objective={self.objective.kind}, need next_token: train the causal routers once the upcycled run "
                "is finished"
            )
        if self.init_from is not None:
            raise ValueError(f"got init_from={self.init_from}, need null: the parameters come from seed_run")


OWN = {f.name for f in fields(UpcycleConfig)} - {f.name for f in fields(TrainConfig)}


def main(composed: Composed) -> int:
    """`moma upcycle`: writes the run folder, prints how it compares with the seed and how to go on; returns 0."""
    config: UpcycleConfig = composed.config
    run_dir = config.run_dir or upcycled_run_dir(composed)
    upcycle(config, run_dir)
    print(f"go on with:\n  {train_command(composed.overrides, run_dir)}")
    return 0


def target_settings(config: UpcycleConfig, run_dir: Path) -> dict[str, Any]:
    """The target's configuration as `moma train` resolves it in `run_dir`."""
    resolved = {key: value for key, value in plain(config).items() if key not in OWN}
    return {**resolved, "run_dir": str(run_dir)}


def upcycled_run_dir(composed: Composed) -> Path:
    """The run folder that `moma train` derives, with `-upcycled` before the seed."""
    base = default_run_dir(composed)
    name, _, seed = base.name.rpartition("-")
    return base.with_name(f"{name}-upcycled-{seed}")


def upcycle(config: UpcycleConfig, run_dir: Path) -> dict[str, Any]:
    """Write the checkpoint of step 0 and `upcycle.json` into `run_dir`; returns what the latter holds.

    Raises ValueError for a pair of seed and target without a defined copy, and for a folder that holds a checkpoint.
    """
    if config.parallel.threads:
        torch.set_num_threads(config.parallel.threads)
    device = choose_device(config.parallel.device)
    vocab = load_vocabulary(asset_folder(config.tokenizer))
    plan = training_plan(config, dict(open_corpus(config.data.corpus, "train", vocab.hash)), vocab)
    newest, meta = _seed(config.seed_run)
    precision = meta["precision"] if config.precision == "auto" else config.precision
    identity = identity_of(target_settings(config, run_dir), precision, vocab, plan, config.data.corpus)
    imported = bool(meta.get("imported"))
    if imported and config.optimizer == "keep":
        raise ValueError(
            f"got optimizer=keep and seed_run={config.seed_run}, an import without an optimizer, need reset: leave "
            "optimizer out"
        )
    changed, _ = config_diff(meta["config"], identity, SAME_AS_IMPORT if imported else SAME)
    if changed:
        raise ValueError(
            f"got a target that differs from {config.seed_run} in more than feed_forward and attention "
            f"({'; '.join(changed)}), need the same: use the seed's overrides"
        )
    seed_config = build(Architecture, {name: meta["config"][name] for name in ARCHITECTURE})
    check_pair(seed_config, config.architecture, vocab.modalities)
    if config.report_batches:
        require_held_out(config.data.corpus, vocab, "report_batches=0")
    units = (config.data.tokens_per_step, training_flops(config, vocab))
    total = config.duration.to_steps(*units, None)
    learning_rate(0, total, config.optim, *units)  # refuses bad schedules before work
    before = meta.get("upcycled") or {"seed_tokens": 0, "seed_flops": 0.0}
    upcycled = {
        "seed_run": str(config.seed_run),
        "seed_step": meta["step"],
        "seed_tokens": meta["meter"]["tokens"] + before["seed_tokens"],  # with those of the seed's own seed
        "seed_flops": meta["meter"]["flops"] + before["seed_flops"],
        "optimizer": config.optimizer,
        "copy_noise": config.copy_noise,
    }
    with checkpoint.alone(run_dir):
        if checkpoint.latest(run_dir / "checkpoints"):
            raise ValueError(
                f"got a checkpoint in {run_dir}, need a new run folder: set another run_dir, or remove the folder"
            )
        tensors = {n: t.to(device) for n, t in checkpoint.read_tensors(newest, "model").items() if not is_aux(n)}
        model = build_model(
            config.architecture, vocab.size, vocab.modalities, seed=config.seed.init,
            aux_routers=config.objective.needs_aux_routers, device=device,
        )  # fmt: skip
        copy_seed(model, tensors, config.copy_noise, config.seed.init)
        exact, words = expected_equality(config.architecture, vocab.modalities, config.copy_noise)
        record = {**upcycled, "exact": exact, "equality": words}
        if config.report_batches:
            batches = validation_batches(config.data.corpus, vocab, config.data, config.report_batches, device)
            record |= compare(seed_model(seed_config, tensors, vocab), model, batches, vocab)
        names = set(tensors)
        del tensors  # what follows holds the optimizer's state instead
        state = {"model": checkpoint.model_state(model), "optimizer": _optimizer_state(config, model, newest, names)}
        write_json(run_dir / "upcycle.json", record)
        checkpoint.save(
            run_dir / "checkpoints",
            0,
            state,
            {
                **provenance(identity, git_state()),
                "data": meta["data"],
                "meter": Meter().state(),
                "metrics_offset": 0,
                "window": {},
                "skipped": 0,
                "val_loss": None,
                "wandb_id": None,
                "total_steps": total,
                "init_step": None,
                "upcycled": upcycled,
            },
            config.checkpoint.keep_last,
        )
    _print(record, run_dir, sum(p.numel() for p in model.parameters()))
    return record


def _seed(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a seed and its meta.json."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is None:
        raise ValueError(f"got seed_run={run_dir} without a checkpoint, need a trained run: train it first")
    meta = checkpoint.read_meta(newest)
    if meta["config"]["objective"]["kind"] != "next_token":
        raise ValueError(
            f"got seed_run={run_dir} of objective={meta['config']['objective']['kind']}, need the run it began from: "
            f"seed_run={meta['config']['init_from']}"
        )
    return newest, meta


# ---- which pairs have a copy ----------------------------------------------------------------------------------------


def layer_groups(config: FeedForwardConfig, n_layers: int, modalities: tuple[str, ...]) -> list[dict[str, int]]:
    """Experts per group of every layer; a dense layer is one group of one, `all`."""
    sparse = () if isinstance(config, DenseConfig) else config.sparse_layers(n_layers)
    return [
        {"all": 1} if isinstance(config, DenseConfig) or n not in sparse else config.groups(modalities, sparse.index(n))
        for n in range(n_layers)
    ]


def check_pair(seed: Architecture, target: Architecture, modalities: tuple[str, ...]) -> None:
    """Raise ValueError unless feed-forward and attention of `target` have a defined copy of those of `seed`."""
    for config, whose in ((seed.feed_forward, "a seed with "), (target.feed_forward, "")):
        if isinstance(config, DenseConfig):
            continue
        if config.width != 1:
            raise ValueError(
                f"got {whose}feed_forward.width={config.width}, need 1: experts of another width have no exact copy of "
                "the seed's feed-forward"
            )
        if config.shared:
            raise ValueError(
                f"got {whose}feed_forward.shared={config.shared}, need 0: a shared expert beside the copies would add "
                "the seed's feed-forward twice"
            )
    n_layers = seed.model.n_layers
    have = layer_groups(seed.feed_forward, n_layers, modalities)
    want = layer_groups(target.feed_forward, n_layers, modalities)
    for n, (old, new) in enumerate(zip(have, want, strict=True)):
        if max(old.values()) > 1:
            raise ValueError(
                f"got a seed with {old} experts in layer {n}, need one feed-forward per token: give a dense or "
                "moe_1t1i run"
            )
        if "all" in new and "all" not in old:
            raise ValueError(
                f"got one feed-forward or group for all modalities in layer {n} and a seed with one per modality, need "
                "groups per modality there, as in moe_4t4i: different feed-forwards have no common copy"
            )
    untied = isinstance(seed.attention, UntiedAttentionConfig)
    if untied and isinstance(target.attention, SharedAttentionConfig):
        raise ValueError(
            "got attention=shared and a seed with attention=untied, need untied: the weights of several modalities "
            "have no common copy"
        )
    if have == want and seed.attention == target.attention:
        raise ValueError(
            "got a target with the seed's own layers, need more experts or untied attention: to train the same model "
            "on, use `moma train init_from=RUN`"
        )


def expected_equality(target: Architecture, modalities: tuple[str, ...], copy_noise: float) -> tuple[bool, str]:
    """Whether a target answers like its seed at step 0 up to rounding, and why, in words."""
    config = target.feed_forward
    sizes = [n for groups in layer_groups(config, target.model.n_layers, modalities) for n in groups.values()]
    if isinstance(config, DenseConfig) or max(sizes) == 1:
        return True, "exact up to rounding: every token goes through a copy of the seed's weights"
    if copy_noise:
        return False, "not expected: copy_noise disturbs every expert but a group's first"
    copies = SELECTIONS[config.selection.kind].copies(config.selection)
    if copies == "whole":
        return True, "exact up to rounding: every token gets copies whose weights sum to 1"
    if copies == "whole_or_none":
        return False, (
            "exact up to rounding only if the capacity leaves every token an expert: one without loses its update"
        )
    if target.model.norm_order == "pre":
        return False, "not expected: in pre-norm order the routers' gates scale every update"
    if copies == "scaled":
        return False, "up to the norms' eps: every token gets a copy, and the norm after it undoes the gate"
    return False, (
        "not expected as a whole: a token that an expert computes keeps its update up to the norm's eps (the norm "
        "undoes the gate), one that no expert computes loses it"
    )


# ---- the copy -------------------------------------------------------------------------------------------------------


def source_of(name: str, seed: AbstractSet[str]) -> str | None:
    """Name of the tensor, among those of the seed, that the target's tensor `name` is made of; None for routers and
    their state. Raises KeyError for any other name without a source."""
    if is_aux(name) or ".feed_forward.router" in name or ".feed_forward.routing_" in name:
        return None
    block, experts, leaf = name.partition(".feed_forward.experts.")
    candidates = [name]  # the same, or of one and the same modality
    if experts:  # a dense feed-forward serves every group
        candidates.append(f"{block}{experts}0.{leaf.partition('.')[2]}")
    else:  # untied attention of shared weights
        candidates.append(f"{name}.weight")
    found = [candidate for candidate in candidates if candidate in seed]
    if not found:
        raise KeyError(f"no tensor of the seed for {name}")
    return found[0]


def as_target(tensor: Tensor, source: str, name: str, shape: torch.Size) -> Tensor:
    """A view of the seed's tensor in the target's shape: repeated over experts or modalities, and transposed where a
    linear layer's (out, in) becomes a stack of (in, out)."""
    return (tensor if source == name or source != f"{name}.weight" else tensor.mT).expand(shape)


@torch.no_grad()
def copy_seed(model: Transformer, tensors: Mapping[str, Tensor], copy_noise: float = 0.0, seed: int = 0) -> None:
    """Fill `model`, freshly built, with the seed's `tensors`; what has no source stays as it was initialised.

    `copy_noise`: see `UpcycleConfig`; drawn from (`seed`, name of the tensor, number of the expert).
    """
    for name, own in model.state_dict().items():
        source = source_of(name, tensors.keys())
        if source is None:
            continue
        own.copy_(as_target(tensors[source], source, name, own.shape))
        if not copy_noise or ".feed_forward.experts." not in name:
            continue
        std = tensors[source].std().cpu() * copy_noise
        for expert in range(1, len(own)):
            noise = torch.randn(own[expert].shape, generator=generator(f"{seed}/{name}/{expert}"))
            own[expert] += (noise * std).to(own)


def seed_model(config: Architecture, tensors: dict[str, Tensor], vocab: Vocabulary) -> Transformer:
    """The seed itself, on the memory of `tensors`."""
    with torch.device("meta"):
        model = Transformer(config, vocab.size, vocab.modalities)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def _optimizer_state(
    config: UpcycleConfig, model: Transformer, seed_checkpoint: Path, seed_names: set[str]
) -> dict[str, Tensor]:
    """AdamW's state of the target: all zeros, or with the copied tensors' moments and step counters."""
    freeze_for(config.objective, model)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    state = checkpoint.optimizer_state(model, optimizer)
    if config.optimizer == "reset":
        return state
    seed = checkpoint.read_tensors(seed_checkpoint, "optimizer")
    for key, own in state.items():
        name, _, what = key.removeprefix("state.").rpartition(".")
        source = source_of(name, seed_names)
        tensor = seed.get(f"state.{source}.{what}")
        if source is not None and tensor is not None:  # None: frozen in the seed, so without a history
            own.copy_(tensor if what == "step" else as_target(tensor, source, name, own.shape))
    return state


# ---- the report -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(seed: Transformer, target: Transformer, batches: Iterable[Batch], vocab: Vocabulary) -> dict[str, Any]:
    """Losses of both (nats, routing mode `train`, without noise, in fp32), largest difference of a logit, and the
    shares of tokens that none, one, several experts of each layer compute."""
    sums: dict[str, Tallies] = {"seed": {}, "upcycled": {}}
    routers: Tallies = {}
    furthest, count = 0.0, 0
    for batch in batches:
        hidden = {}
        target_T, mask = batch.target_RL.flatten(), document_mask(batch.document_RL)
        for name, model in (("seed", seed), ("upcycled", target)):
            noise = routing_noise(model, batch.number, target_T.numel(), 0, training=False)
            hidden_RLD, stats = model(
                batch.tokens_RL, batch.position_RL, mask, batch.groups, "train", disturbances=noise
            )
            hidden[name] = hidden_RLD.flatten(0, 1)[batch.document_RL.flatten() >= 0]
            losses = linear_cross_entropy(
                hidden_RLD.flatten(0, 1), model.head.weight, target_T, denominator=1.0, z_weight=0.0
            )
            _add(sums[name], loss_tallies(losses, target_T, vocab))
        _add(routers, router_tallies(stats, batch, vocab))  # of the target, which came last
        pairs = zip(*(hidden[name].split(CHUNK_TOKENS) for name in ("seed", "upcycled")), strict=True)
        for a_CD, b_CD in pairs:
            difference_CV = a_CD @ seed.head.weight.T - b_CD @ target.head.weight.T
            furthest = max(furthest, difference_CV.abs().max().item())
        count += 1
    loss = {
        name: {key: (total / n).item() for key, (total, n) in tallies.items() if n and key != "z_loss"}
        for name, tallies in sums.items()
    }
    gap = {key: value - loss["seed"][key] for key, value in loss["upcycled"].items()}
    return {
        "mode": "train",
        "micro_batches": count,
        "loss": {**loss, "gap": gap},
        "max_logit_difference": furthest,
        "layers": served(routers),
    }


def _add(total: Tallies, tallies: Tallies) -> None:
    for name, tally in tallies.items():
        total[name] = total[name] + tally.double() if name in total else tally.double()


def served(tallies: Tallies) -> dict[str, dict[str, dict[str, float]]]:
    """Per layer and modality (`all`: together): shares of the routed tokens that none, one, several experts compute."""
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tally in tallies.items():
        _, layer, what = name.split("/")
        kind, _, modality = what.partition("_")
        if kind in ("unserved", "single", "several") and not layer.endswith(".depth") and tally[1]:
            for key in (modality, "all"):
                own = layers.setdefault(layer, {}).setdefault(key, {})
                own[kind] = own[kind] + tally if kind in own else tally
    return {
        layer: {
            key: {kind: (t[0] / t[1]).item() for kind, t in shares[key].items()}
            for key in sorted(shares, key=lambda key: key == "all")
        }
        for layer, shares in layers.items()
    }


def _print(record: dict[str, Any], run_dir: Path, n_parameters: int) -> None:
    print(
        f"{run_dir}: step 0, {n_parameters / 1e6:.2f} M parameters, upcycled from {record['seed_run']} at step "
        f"{record['seed_step']} ({record['seed_tokens']:,} tokens), optimizer={record['optimizer']}\n"
        f"equality with the seed: {record['equality']}"
    )
    for layer, shares in record.get("layers", {}).items():
        shown = "; ".join(
            f"{name} {s['unserved']:.1%} {s['single']:.1%} {s['several']:.1%}" for name, s in shares.items()
        )
        print(f"  layer {layer}, tokens that none, one, several experts compute: {shown}")
    if "loss" in record:
        seed, now, gap = (record["loss"][name] for name in ("seed", "upcycled", "gap"))
        for name in now:
            print(f"  held-out {name}: {seed[name]:.6f} -> {now[name]:.6f} ({gap[name]:+.2e})")
        print(
            f"  logits differ by at most {record['max_logit_difference']:.2e} ({record['micro_batches']} micro-batches)"
        )


def train_command(overrides: Iterable[str], run_dir: Path) -> str:
    """The `moma train` that goes on in `run_dir`: the overrides of `moma upcycle` without its own."""
    shared = [o for o in overrides if o.partition("=")[0].lstrip("+~") not in (*OWN, "run_dir")]
    return shlex.join(["moma", "train", *shared, f"run_dir={run_dir}"])
