"""Export: a dense run -> a folder that transformers' `ChameleonForConditionalGeneration.from_pretrained` reads.

    RUN/checkpoints/<newest>   -> model.safetensors, or shards of at most `shard_bytes` and their index
    RUN/hf/                    -> vqmodel's tensors, config.json and the other small files, as they came

What an import took in comes out again bit for bit: every name, every tensor, every small file. A run that was trained
on has no `hf/` of its own: `like=IMPORT` takes it from the import that it began from. Without either, `config.json` is
made of the run's sizes and its vocabulary, and there are no tensors for pictures: feed it ids.

`dtype` auto: an import's stored dtypes; fp32, which is what is trained, for anything else. One shard is in memory at a
time. Written under a temporary name, then renamed. transformers masks the logits of image codes, ours does not: see
`moma/hf_chameleon.py`.

Refuses what Chameleon has no tensors for: experts, untied attention, mixture of depths, no QK-norm.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moma import checkpoint, hf_chameleon
from moma.config import Composed, build
from moma.data.shards import write_json
from moma.hf_chameleon import CONFIG, INDEX, NAMES, WEIGHTS, Parts
from moma.import_hf import BESIDE, CARRIED
from moma.model.attention import SharedAttentionConfig
from moma.model.depth import FullDepthConfig
from moma.model.feed_forward import DenseConfig
from moma.model.transformer import ARCHITECTURE, Architecture, ModelConfig
from moma.tokenizer.vocab import asset_folder, load_vocabulary

_DTYPES = {name: dtype for dtype, name in NAMES.items()} | {"fp32": torch.float32, "bf16": torch.bfloat16}
POSITIONS = 4096  # what a model that never saw a row is said to read; Chameleon's own


@dataclass(frozen=True)
class ExportHfConfig:
    """`run`: a dense run folder; `out`: the folder to make; `like`: the import that the run began from."""

    run: Path
    out: Path
    like: Path | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    shard_bytes: int = 5_000_000_000


class Unit(NamedTuple):
    """What is read at once and goes into one shard: tensors of their names, made by `fetch`."""

    names: tuple[str, ...]
    n_bytes: int
    fetch: Callable[[], list[Tensor]]


def main(composed: Composed) -> int:
    """`moma export_hf`: writes the folder; returns 0."""
    config: ExportHfConfig = composed.config
    n_bytes, n_files = export_hf(config)
    print(f"{config.out}: {n_bytes / 1e9:.3f} GB of tensors in {n_files} files, from {config.run}")
    return 0


def export_hf(config: ExportHfConfig) -> tuple[int, int]:
    """Write `config.out`; returns the bytes of its tensors and the number of their files.

    Raises ValueError for a run that has no counterpart, a `like` of another model, an `out` that is there already.
    """
    newest = checkpoint.latest(config.run / "checkpoints")
    if newest is None:
        raise ValueError(f"got run={config.run} without a checkpoint, need a trained or imported run: train it first")
    if config.out.exists():
        raise ValueError(f"got out={config.out}, which is there already, need a new folder: give another, or remove it")
    meta = checkpoint.read_meta(newest)
    model = dense_model(build(Architecture, {name: meta["config"][name] for name in ARCHITECTURE}))
    beside = _beside(config, meta)
    tensors = checkpoint.open_group(newest, "model")
    layout = hf_chameleon.layout(model, tensors["head.weight"].shape[0])
    dtypes = _dtypes(config, meta, layout)
    units = [_unit(parts, tensors[name], dtypes) for name, parts in layout.items()]
    if (beside / WEIGHTS).is_file():
        units += _pictures(beside / WEIGHTS)
    shards = plan_shards(units, config.shard_bytes)
    hf_config = _config(config, meta, model, beside, dtypes)

    temporary = config.out.with_name(f".tmp-{config.out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in CARRIED:
        if (beside / name).is_file():
            shutil.copyfile(beside / name, temporary / name)
    if hf_config is not None:
        write_json(temporary / CONFIG, hf_config)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= {name: file for unit in shard for name in unit.names}
        hf_chameleon.write_file(
            temporary / file,
            {name: t for unit in shard for name, t in zip(unit.names, unit.fetch(), strict=True)},
        )
    total = sum(unit.n_bytes for unit in units)
    if len(shards) > 1:
        write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    temporary.rename(config.out)
    return total, len(shards)


def dense_model(architecture: Architecture) -> ModelConfig:
    """The sizes of a run that Chameleon has the tensors for; ValueError for any other."""
    odd = {
        "feed_forward": not isinstance(architecture.feed_forward, DenseConfig),
        "attention": not isinstance(architecture.attention, SharedAttentionConfig),
        "depth": not isinstance(architecture.depth, FullDepthConfig),
        "model.qk_norm": architecture.model.qk_norm == "none",
    }
    need = {"feed_forward": "dense", "attention": "shared", "depth": "full", "model.qk_norm": "shared or per_head"}
    for name, refused in odd.items():
        if refused:
            raise ValueError(
                f"got a run with another {name}, need {name}={need[name]}: Chameleon has no tensors for it"
            )
    return architecture.model


def plan_shards(units: Sequence[Unit], shard_bytes: int) -> list[list[Unit]]:
    """Units in their order, as many to a shard as fit; ValueError for one that is bigger than a shard."""
    largest = max(units, key=lambda unit: unit.n_bytes)
    if largest.n_bytes > shard_bytes:
        raise ValueError(
            f"got shard_bytes={shard_bytes}, need at least the {largest.n_bytes} of {', '.join(largest.names)}: raise "
            "shard_bytes"
        )
    shards, room = [[]], shard_bytes
    for unit in units:
        if unit.n_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(unit)
        room -= unit.n_bytes
    return shards


def _unit(parts: Parts, tensor: checkpoint.Lazy, dtypes: dict[str, torch.dtype]) -> Unit:
    def fetch() -> list[Tensor]:
        found = hf_chameleon.take_apart(parts, tensor.fetch())
        return [part.to(dtypes[name]) for name, part in zip(parts.names, found, strict=True)]

    sizes = zip(parts.names, parts.shapes, strict=True)
    return Unit(parts.names, sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in sizes), fetch)


def _pictures(path: Path) -> list[Unit]:
    """The picture tokenizer's tensors, as they came."""
    file = hf_chameleon.open_files([path])
    return [
        Unit((name,), form.n_bytes, lambda name=name: [hf_chameleon.fetch(file, name)])
        for name, form in file.forms.items()
    ]


def _beside(config: ExportHfConfig, meta: dict[str, Any]) -> Path:
    """The folder of what travels along; it may not exist."""
    if config.like is None:
        return config.run / BESIDE
    newest = checkpoint.latest(config.like / "checkpoints")
    record = checkpoint.read_meta(newest) if newest else {}
    if not record.get("imported") or not (config.like / BESIDE).is_dir():
        raise ValueError(
            f"got like={config.like}, which is no import of a Hugging Face folder, need one: leave like out"
        )
    if record["vocab_hash"] != meta["vocab_hash"]:
        raise ValueError(
            f"got like={config.like} of another tokenizer than {config.run}, need the import that it began from: "
            "correct like"
        )
    return config.like / BESIDE


def _dtypes(config: ExportHfConfig, meta: dict[str, Any], layout: dict[str, Parts]) -> dict[str, torch.dtype]:
    """The dtype to write by Hugging Face's names."""
    imported = meta.get("imported") or {"dtype": "fp32", "other_dtypes": {}}
    wanted, others = imported["dtype"], imported["other_dtypes"]
    if config.dtype != "auto":
        wanted, others = config.dtype, {}
    names = [name for parts in layout.values() for name in parts.names]
    return {name: _DTYPES[others.get(name, wanted)] for name in names}


def _config(
    config: ExportHfConfig, meta: dict[str, Any], model: ModelConfig, beside: Path, dtypes: dict[str, torch.dtype]
) -> dict[str, Any] | None:
    """What config.json must say; None: what lies in `beside`, to the last byte."""
    dtype = NAMES[dtypes["lm_head.weight"]]
    if not (beside / CONFIG).is_file():
        vocab = load_vocabulary(asset_folder(meta["config"]["tokenizer"]))
        if vocab.hash != meta["vocab_hash"]:
            raise ValueError(
                f"got tokenizer={meta['config']['tokenizer']} with hash {vocab.hash}, need the run's, hash "
                f"{meta['vocab_hash']}: restore that tokenizer"
            )
        positions = meta["config"].get("data", {}).get("row_length", POSITIONS)
        return hf_chameleon.config_of(model, vocab, positions) | {"dtype": dtype}
    stored = hf_chameleon.read_json(beside / CONFIG)
    theirs = replace(hf_chameleon.model_of(stored, shared_qk_norm=False), qk_norm=model.qk_norm)
    ours = replace(model, n_kv_heads=model.kv_heads, hidden_dim=model.ffn_dim)
    if ours != theirs:
        raise ValueError(
            f"got {beside / CONFIG} of {theirs}, need that of {config.run}, {ours}: correct like, or leave it out"
        )
    if config.dtype == "auto" and meta.get("imported"):
        return None
    return {key: value for key, value in stored.items() if key != "torch_dtype"} | {"dtype": dtype}
