"""Image tokenizers of others: taming-transformers' files (Chameleon's `vqgan.ckpt`) and transformers' ChameleonVQVAE.

    vqgan.ckpt + vqgan.yaml           --read_taming-->  VqModel  --write_taming-->   the same two files
    config.json + *.safetensors       --read_hf-->      VqModel  --to_hf_tensors-->  tensors and `vq_config`
    (model.vqmodel.*, vqmodel.*, or bare names)

`save_vq` then writes the image half of an asset. Parameter names are taming's in all three, so nothing is renamed;
only the settings are. transformers leaves Chameleon's decoder out: such a tokenizer encodes only. Each reader also
names the preprocessing that belongs to its files, `meta` or `hf` (moma/tokenizer/image.py).

Files are a stranger's: checkpoints are read by torch's `weights_only` unpickler, which runs no code, YAML by the safe
loader, and `ckpt_path` in it is not followed. Refused, by name: weights that the settings do not ask for (but
`loss.*`, the training's), missing or misshapen ones, settings of networks that `model.py` does not build.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moma.schema import build, read_json
from moma.vqgan.model import VqConfig, VqModel

MAX_YAML = 2**20  # bytes; published ones have a few kilobytes
MAX_JSON = 2**25  # a Chameleon's config.json lists its vocabulary
_INDEX = "model.safetensors.index.json"
_BOOK = "quantize.embedding.weight"
_PREFIXES = ("model.vqmodel.", "vqmodel.", "")
_GROUPS = 32  # of every norm of both families


@dataclass(frozen=True)
class _Ddconfig:
    """taming's `ddconfig`; no default where taming has none or another than Chameleon's."""

    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    in_channels: int
    resolution: int
    z_channels: int
    double_z: Literal[False]
    dropout: float = 0.0  # of training alone
    resamp_with_conv: Literal[True] = True
    give_pre_end: Literal[False] = False
    tanh_out: Literal[False] = False
    use_linear_attn: Literal[False] = False
    attn_type: Literal["vanilla", "none"] = "vanilla"


@dataclass(frozen=True)
class _Params:
    """taming's `model.params`; of those below `remap` nothing touches the weights or the codes."""

    ddconfig: _Ddconfig
    n_embed: int
    embed_dim: int
    remap: Literal[None] = None
    lossconfig: Any = None
    ckpt_path: Any = None
    ignore_keys: Any = None
    image_key: Any = None
    colorize_nlabels: Any = None
    monitor: Any = None
    scheduler_config: Any = None
    lr_g_factor: Any = None
    sane_index_shape: Any = None


@dataclass(frozen=True)
class _HfConfig:
    """transformers' ChameleonVQVAEConfig with its defaults, which its files may leave out."""

    embed_dim: int = 256
    num_embeddings: int = 8192
    double_latent: Literal[False] = False
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] | None = None
    attn_type: str | None = "vanilla"


def read_taming(checkpoint: Path, settings: Path) -> VqModel:
    """The model of a taming checkpoint and its YAML (`model.params`), in float32 and evaluation mode.

    Raises ValueError for files that are missing, damaged or hold more than tensors and plain values, for unknown
    settings, and for weights that do not fit the settings.
    """
    text = _read(settings, MAX_YAML)
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"got {settings}, which is not plain YAML ({_first_line(error)}), need taming's settings: fetch it again"
        ) from error
    for key in ("model", "params"):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Mapping):
        raise ValueError(f"got {settings} without model.params, need taming's settings there: give the model's YAML")
    params: _Params = build(_Params, tree, "model.params")
    dd = params.ddconfig
    if dd.out_ch != dd.in_channels:
        raise ValueError(
            f"got {dd.in_channels} in_channels and {dd.out_ch} out_ch, need equal numbers: take a tokenizer of pictures"
        )
    config = VqConfig(
        resolution=dd.resolution,
        in_channels=dd.in_channels,
        ch=dd.ch,
        ch_mult=dd.ch_mult,
        num_res_blocks=dd.num_res_blocks,
        z_channels=dd.z_channels,
        embed_dim=params.embed_dim,
        n_embed=params.n_embed,
        attn_levels=_levels(dd.attn_resolutions, dd.resolution, dd.ch_mult, dd.attn_type == "vanilla"),
        mid_attention=dd.attn_type == "vanilla",
        preprocessing="meta",
    )
    weights = _unpickled(checkpoint)
    return _model(config, {k: t for k, t in weights.items() if not k.startswith("loss.")}, str(checkpoint))


def write_taming(model: VqModel, checkpoint: Path, settings: Path) -> None:
    """Write `model` as taming's two files; `read_taming` gives the same weights, and `meta` as preprocessing.

    Raises ValueError for what taming cannot build: a decoder of other widths or none, other norm groups.
    """
    config = model.config
    same = (config.decoder_widths, config.decoder_blocks) == (config.encoder_widths, config.num_res_blocks + 1)
    if not (config.decoder and same):
        raise ValueError(
            "got a tokenizer without a decoder or with one of its own widths, need one like the encoder to write "
            "taming's files: keep moma's format (save_vq)"
        )
    _check_groups(config, "taming's files")
    ddconfig = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [config.resolution // 2**level for level in config.attn_levels],
        "dropout": 0.0,
    }
    if not config.mid_attention:
        ddconfig["attn_type"] = "none"
    params = {"embed_dim": config.embed_dim, "n_embed": config.n_embed, "ddconfig": ddconfig}
    settings.write_text(yaml.safe_dump({"model": {"params": params}}, sort_keys=False))
    torch.save({"state_dict": {name: t.detach().cpu() for name, t in model.state_dict().items()}}, checkpoint)


def read_hf(folder: Path) -> VqModel:
    """The image tokenizer in a folder of transformers' Chameleon, or of its ChameleonVQVAE alone, in float32.

    Reads `config.json` and, of one safetensors file or of the shards of an index, the tokenizer's tensors only.
    Raises ValueError as `from_hf_tensors`, and for missing or damaged files.
    """
    config = read_json(folder / "config.json", MAX_JSON)
    settings = config.get("vq_config", config)
    if not isinstance(settings, Mapping) or ("vq_config" not in config and "base_channels" not in config):
        raise ValueError(
            f"got {folder / 'config.json'} without vq_config, need that of a Chameleon model or of its "
            "ChameleonVQVAE: give that model's folder"
        )
    shards: dict[str, list[str]] = {}
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX, MAX_JSON).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"got {folder / _INDEX} without weight_map, need the file of each tensor: fetch it again")
        for name, shard in index.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"got shard {shard!r} in {folder / _INDEX}, need plain file names: mend the index")
            shards.setdefault(shard, []).append(name)
    else:
        shards["model.safetensors"] = []  # all of its names
    prefix = _prefix(name for names in shards.values() for name in names)
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        if not names or any(name.startswith(prefix) for name in names):
            tensors |= _tensors(folder / shard)
    return from_hf_tensors(tensors, settings, str(folder))


def from_hf_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str = "the tensors") -> VqModel:
    """The image tokenizer of transformers' tensors, by name with or without `model.vqmodel.`, and its `vq_config`.

    Keys of `settings` that ChameleonVQVAEConfig does not define are transformers' own and left alone. With `decoder.*`
    (in taming's order, as Anole's port has it) the model decodes, else it only encodes. Raises ValueError for
    settings of other networks and weights that do not fit; `source` names the tensors in messages.
    """
    known = {name: settings[name] for name in _HfConfig.__dataclass_fields__ if name in settings}
    hf: _HfConfig = build(_HfConfig, known, "vq_config")
    prefix = _prefix(tensors)
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    config = VqConfig(
        resolution=hf.resolution,
        in_channels=hf.in_channels,
        ch=hf.base_channels,
        ch_mult=hf.channel_multiplier,
        num_res_blocks=hf.num_res_blocks,
        z_channels=hf.latent_channels,
        embed_dim=hf.embed_dim,
        n_embed=hf.num_embeddings,
        attn_levels=_levels(hf.attn_resolutions or (), hf.resolution, hf.channel_multiplier, hf.attn_type == "vanilla"),
        mid_attention=hf.attn_type == "vanilla",
        decoder=any(name.startswith("decoder.") for name in weights),
        preprocessing="hf",
    )
    return _model(config, weights, source)


def to_hf_tensors(model: VqModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by transformers' names (`model.vqmodel.*`, without the decoder) and the `vq_config` of `model`.

    Raises ValueError for norm groups that transformers does not have.
    """
    config = model.config
    _check_groups(config, "transformers' model")
    tensors = {
        f"{_PREFIXES[0]}{name}": t.detach().cpu()
        for name, t in model.state_dict().items()
        if not name.startswith("decoder.")
    }
    settings = {
        "model_type": "chameleon_vqgan",
        "embed_dim": config.embed_dim,
        "num_embeddings": config.n_embed,
        "double_latent": False,
        "latent_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": config.in_channels,
        "base_channels": config.ch,
        "channel_multiplier": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [config.resolution // 2**level for level in config.attn_levels] or None,
        "dropout": 0.0,
        "attn_type": "vanilla" if config.mid_attention else "none",
    }
    return tensors, settings


def _levels(resolutions: Iterable[int], resolution: int, ch_mult: tuple[int, ...], attention: bool) -> tuple[int, ...]:
    """Numbers of the levels whose feature maps have one of `resolutions` pixels a side."""
    return tuple(i for i in range(len(ch_mult)) if attention and resolution // 2**i in set(resolutions))


def _model(config: VqConfig, weights: Mapping[str, Tensor], source: str) -> VqModel:
    """The model with these weights, all of them and no others."""
    if config.num_res_blocks * len(config.ch_mult) > len(weights):  # before building as many blocks as a file asks for
        raise ValueError(
            f"got {len(weights)} weights in {source}, need those of {config.num_res_blocks} blocks in each of "
            f"{len(config.ch_mult)} levels: give the settings and weights of one model"
        )
    with torch.device("meta"):
        model = VqModel(config)
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in weights.items()}
    for what, names in (
        ("without", want.keys() - have.keys()),
        ("with the unknown", have.keys() - want.keys()),
        ("with misshapen", {name for name in want.keys() & have.keys() if want[name] != have[name]}),
    ):
        if names:
            first = min(names)
            shapes = f" of shape {have[first]}" if first in have else ""
            shapes += f", need {want[first]}" if first in want else ", need none of this name"
            raise ValueError(
                f"got {source} {what} {first}{shapes} ({len(names)} such): give the settings and weights of one model"
            )
    for name, t in weights.items():
        if not t.is_floating_point() or t.layout != torch.strided:
            raise ValueError(f"got {name} as {t.dtype} in {source}, need plain floats: give the unpacked weights")
    # copies: the caller's tensors stay the caller's
    own = {n: t.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for n, t in weights.items()}
    model.load_state_dict(own, assign=True)
    return model.eval().requires_grad_(False)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors by name under `state_dict` of a checkpoint."""
    if not path.is_file():
        raise ValueError(f"got no file {path}, need taming's checkpoint: give its path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own text, which tells how to read the file without this guard.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ValueError(
            f"got {path}, which is damaged or holds more than tensors{what}, need a checkpoint of tensors alone, since "
            "anything else may run code: fetch it again, or ask its author for the bare state_dict"
        ) from error
    except Exception as error:  # a damaged archive shows itself in many kinds
        raise ValueError(
            f"got {path}, which is no complete checkpoint ({type(error).__name__}: {_first_line(error)}), need one "
            "written by torch.save: fetch it again"
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"got {path} without state_dict, need the weights under it: give taming's checkpoint")
    for name, t in weights.items():
        if not isinstance(name, str) or not isinstance(t, Tensor):
            raise ValueError(f"got {name!r} in {path}, which is no tensor, need tensors alone: remove it")
    return weights


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tokenizer's tensors of a safetensors file."""
    if not path.is_file():
        raise ValueError(f"got no file {path}, need the weights as safetensors: complete the folder")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            prefix = _prefix(names)
            return {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except SafetensorError as error:
        raise ValueError(
            f"got {path}, which is no complete safetensors file ({_first_line(error)}), need one: fetch it again"
        ) from error


def _prefix(names: Iterable[str]) -> str:
    """What stands in front of the tokenizer's names."""
    names = list(names)
    return next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")


def _read(path: Path, limit: int) -> str:
    if not path.is_file():
        raise ValueError(f"got no file {path}, need the tokenizer's settings: give the path to a complete download")
    if path.stat().st_size > limit:
        raise ValueError(f"got {path} of {path.stat().st_size} bytes, need settings of at most {limit}: check the path")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"got {path}, which is not UTF-8 text, need settings: fetch it again") from error


def _check_groups(config: VqConfig, what: str) -> None:
    widths = {config.ch, *config.encoder_widths}
    if config.norm_groups != _GROUPS or any(width % _GROUPS for width in widths):
        raise ValueError(
            f"got norms of {config.norm_groups} groups on widths {sorted(widths)}, need {_GROUPS} groups and multiples "
            f"of it for {what}: keep moma's format (save_vq)"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
