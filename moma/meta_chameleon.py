"""Chameleon as Meta stores it: `params.json` and `consolidated*.pth`, one file per model-parallel rank.

    tok_embeddings                              (V, D / n)   side by side      wq, wk, wv, w1, w3, output   one below
    attention.wo, feed_forward.w2   (D, .. / n)              side by side      the other
    attention_norm, ffn_norm, norm              every rank has a copy: their mean, as Hugging Face takes it
    attention.{q,k}_normalization               one per rank, for the heads of that rank

RoPE rotates neighbours there, (2 a, 2 a + 1), and (a, a + A/2) here and at Hugging Face: the rows of wq and wk and the
QK-norms change places. `fetch` gives a tensor in Hugging Face's name and form (`moma/hf_chameleon.py`), so one table
serves both; the files are mapped, and one tensor's parts of all ranks are in memory at a time.

`params.json` is read as Meta's code does: `consolidate_params.json` over its nested `model` over its top level.

Refuses ranks that are missing or do not fit each other, pickles that hold anything but tensors, and files too old to
be mapped.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moma.hf_chameleon import Form, integer, number, read_json
from moma.model.transformer import ModelConfig

PARAMS, CONSOLIDATED = "params.json", "consolidate_params.json"
_STRAYS = ("rope.freqs",)  # a buffer that Meta's own loader leaves out

_LAYER = {
    "input_layernorm.weight": ("attention_norm.weight", "mean"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "mean"),
    "self_attn.q_proj.weight": ("attention.wq.weight", "rotated rows"),
    "self_attn.k_proj.weight": ("attention.wk.weight", "rotated rows"),
    "self_attn.v_proj.weight": ("attention.wv.weight", "rows"),
    "self_attn.o_proj.weight": ("attention.wo.weight", "columns"),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", "rows"),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", "rows"),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", "columns"),
    **{
        f"self_attn.{name}_norm.{leaf}": (f"attention.{name}_normalization.{leaf}", "heads")
        for name in "qk"
        for leaf in ("weight", "bias")
    },
}
_ENDS = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", "columns"),
    "model.norm.weight": ("norm.weight", "mean"),
    "lm_head.weight": ("output.weight", "rows"),
}


class Ranks(NamedTuple):
    """The files of all ranks, and the forms of the first one's tensors by Meta's names."""

    files: tuple[Path, ...]
    forms: dict[str, Form]


def read_params(folder: Path) -> dict[str, Any]:
    """The parameters of a checkpoint; ValueError for a missing or damaged `params.json`."""
    params = read_json(folder / PARAMS)
    nested = params.get("model", {})
    if not isinstance(nested, dict):
        raise ValueError(f"got model={nested!r:.40} in {folder / PARAMS}, need an object: copy the file again")
    over = read_json(folder / CONSOLIDATED) if (folder / CONSOLIDATED).is_file() else {}
    return {**params, **nested, **over}


def model_of(params: Mapping[str, Any]) -> ModelConfig:
    """Our sizes and wiring; ValueError for what is missing or no number.

    With one rank, all heads of a layer share one QK-norm; with several, only those of a rank do.
    """
    dim, n_heads = integer(params, "dim"), integer(params, "n_heads")
    multiple = integer({"multiple_of": 256, **params}, "multiple_of")
    width = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(number(params, "ffn_dim_multiplier", 1.0) * width)
    norm = "shared" if ranks_of(params) == 1 else "per_head"
    return ModelConfig(
        dim=dim,
        n_layers=integer(params, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads if params.get("n_kv_heads") is None else integer(params, "n_kv_heads"),
        hidden_dim=-(-width // multiple) * multiple,
        norm_order="swin" if params.get("swin_norm") else "pre",
        norm_eps=number(params, "norm_eps", 1e-5),
        qk_norm=norm if params.get("qk_normalization") else "none",
        rope_theta=number(params, "rope_theta", 10_000.0),
    )


def ranks_of(params: Mapping[str, Any]) -> int:
    """How many files the parameters speak of."""
    return integer({"model_parallel_size": 1, **params}, "model_parallel_size")


def open_ranks(folder: Path, params: Mapping[str, Any]) -> Ranks:
    """Find the files of all ranks and read what they hold, no tensor.

    Raises ValueError for files that are missing or too many, damaged, hold anything but tensors, or differ.
    """
    n_ranks = ranks_of(params)
    single = folder / "consolidated.pth"
    numbered = sorted(p for p in folder.glob("consolidated.*.pth") if re.fullmatch(r"consolidated\.\d\d\.pth", p.name))
    files = (single,) if single.is_file() else tuple(numbered)
    if len(files) != n_ranks or any(path.name != f"consolidated.{i:02d}.pth" for i, path in enumerate(numbered)):
        raise ValueError(
            f"got {', '.join(path.name for path in files) or 'no consolidated.pth'} in {folder}, need "
            f"{n_ranks} files for model_parallel_size={n_ranks}: copy the whole checkpoint"
        )
    found = [
        {name: Form(tuple(t.shape), t.dtype) for name, t in _load(path, "meta").items() if name not in _STRAYS}
        for path in files
    ]
    for path, forms in zip(files, found, strict=True):
        if forms != found[0]:
            name = next(n for n in sorted(forms.keys() | found[0].keys()) if forms.get(n) != found[0].get(n))
            raise ValueError(
                f"got {name} in another form in {path.name} than in {files[0].name}, need ranks of one checkpoint: "
                "copy it again"
            )
    return Ranks(files, found[0])


def _load(path: Path, device: str) -> dict[str, Tensor]:
    """A rank's tensors, mapped, not read."""
    try:
        loaded = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"got {path} that holds more than tensors, need a plain state dict: it may be harmful, do not load it"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"got a damaged or very old {path} ({error}), need a whole file: copy it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"got {path} without tensors by name, need a plain state dict: give another checkpoint")
    return loaded


def source_of(name: str) -> tuple[str, str]:
    """Meta's name of a tensor by Hugging Face's, and how its ranks are put together."""
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        inner, how = _LAYER[found[2]]
        return f"layers.{found[1]}.{inner}", how
    return _ENDS[name]


def forms_of(ranks: Ranks, model: ModelConfig) -> dict[str, Form]:
    """Forms of the whole tensors by Hugging Face's names, those of names without a counterpart as they are.

    Raises ValueError where the heads cannot be shared out among the ranks.
    """
    n, head_dim = len(ranks.files), model.dim // model.n_heads
    if model.n_heads % n or model.kv_heads % n:
        raise ValueError(
            f"got {model.n_heads} heads and {model.kv_heads} key heads on {n} ranks, need multiples: correct {PARAMS}"
        )
    back: dict[str, tuple[str, str]] = {}
    for layer in range(model.n_layers):
        for inner, (name, how) in _LAYER.items():
            back[f"layers.{layer}.{name}"] = (f"model.layers.{layer}.{inner}", how)
    back |= {name: (theirs, how) for theirs, (name, how) in _ENDS.items()}
    found = {}
    for name, (shape, dtype) in ranks.forms.items():
        theirs, how = back.get(name, (name, "as it is"))
        if how in ("rows", "rotated rows"):
            shape = (shape[0] * n, *shape[1:])
        elif how == "columns":
            shape = (*shape[:-1], shape[-1] * n)
        elif how == "heads" and shape == (head_dim,):
            shape = (model.n_heads if ".q_" in theirs else model.kv_heads, head_dim)
        found[theirs] = Form(shape, dtype)
    return found


def fetch(ranks: Ranks, model: ModelConfig, name: str) -> Tensor:
    """One tensor by Hugging Face's name and in its form, put together from all ranks, with memory of its own."""
    source, how = source_of(name)
    parts = [_load(path, "cpu")[source] for path in ranks.files]
    head_dim = model.dim // model.n_heads
    if how == "mean":
        return torch.stack(parts).mean(0)
    if how == "heads":
        heads = model.n_heads if ".q_" in name else model.kv_heads
        halves_RA = torch.stack(parts).unflatten(1, (head_dim // 2, 2)).transpose(1, 2).flatten(1)
        return halves_RA.repeat_interleave(heads // len(parts), dim=0)
    whole = torch.cat(parts, dim=1 if how == "columns" else 0)
    if how != "rotated rows":
        return whole
    return whole.view(-1, head_dim // 2, 2, whole.shape[1]).transpose(1, 2).reshape(whole.shape)
