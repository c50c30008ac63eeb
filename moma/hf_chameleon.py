"""Chameleon as Hugging Face stores it: which tensor is which, `config.json`, folders of safetensors.

    model.embed_tokens.weight, lm_head.weight                    embedding.weight, head.weight
    model.norm.weight                                            norm.weight
    ....self_attn.{q,k,v}_proj.weight                            ....attention.wqkv.weight     one below the other
    ....self_attn.o_proj.weight                                  ....attention.wo.weight
    ....self_attn.{q,k}_norm.{weight,bias}    (heads, A)         ....attention.qk_norm.*       (heads or 1, 1, A)
    ....mlp.{gate,up}_proj.weight             (F, D) each        ....feed_forward.experts.0.w13       (1, D, 2 F)
    ....mlp.down_proj.weight                  (D, F)             ....feed_forward.experts.0.w2        (1, F, D)
    ....input_layernorm.weight                                   ....attention_norm.weight
    ....post_attention_layernorm.weight                          ....feed_forward_norm.weight

`....` is `model.layers.N` there and `blocks.N` here. Both rotate the pairs (a, a + A/2), and in both the QK-norm's eps
is 1e-5 whatever `rms_norm_eps` is, so nothing but place and orientation changes: both ways keep every bit. The QK-norm
has weights per head there; heads that share them are repeated.

**Image logits.** `ChameleonForConditionalGeneration.forward` sets the logits of all image codes (the names `IMGIMG...`
of `vocabulary_map`) to the smallest number of the dtype, in training too: it never draws a picture, and its loss on
image targets is useless. Our logits are those before that mask, `lm_head(model(ids))` there; those of text agree.

The picture tokenizer (`model.vqmodel.*`) is no part of the decoder: its tensors travel beside a run as they are.

Refuses pickles (.bin), files named outside the folder, and whatever our decoder has no counterpart of: biases, scaled
RoPE, tied embeddings, other activations, quantised weights. Dropout is for training and left out.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moma import schema
from moma.checkpoint import Lazy
from moma.modality import Vocabulary
from moma.model.transformer import ModelConfig

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
VQ_PREFIX = "model.vqmodel."
MAX_JSON = 64 * 2**20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# Keys of config.json and the values that our decoder has; the first one stands for a key that is not there.
_HAS = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


# ---- which tensor is which ------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What one of our tensors is made of there: names, shapes, and how they are put together."""

    how: Literal["same", "rows", "columns", "heads"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]  # our shape


def layout(model: ModelConfig, vocab_size: int) -> dict[str, Parts]:
    """All tensors of a dense decoder by our names, in the order of the layers."""
    dim, width = model.dim, model.ffn_dim
    head_dim = dim // model.n_heads
    queries, keys = model.n_heads * head_dim, model.kv_heads * head_dim

    def same(name: str, *shape: int) -> Parts:
        return Parts("same", (name,), (shape,), shape)

    found = {"embedding.weight": same("model.embed_tokens.weight", vocab_size, dim)}
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found[f"{ours}.attention_norm.weight"] = same(f"{theirs}.input_layernorm.weight", dim)
        found[f"{ours}.attention.wqkv.weight"] = Parts(
            "rows",
            tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv"),
            ((queries, dim), (keys, dim), (keys, dim)),
            (queries + 2 * keys, dim),
        )
        found[f"{ours}.attention.wo.weight"] = same(f"{theirs}.self_attn.o_proj.weight", dim, queries)
        if model.qk_norm != "none":
            for name, heads in (("q", model.n_heads), ("k", model.kv_heads)):
                own = (heads if model.qk_norm == "per_head" else 1, 1, head_dim)
                for leaf in ("weight", "bias"):
                    found[f"{ours}.attention.qk_norm.{name}_{leaf}"] = Parts(
                        "heads", (f"{theirs}.self_attn.{name}_norm.{leaf}",), ((heads, head_dim),), own
                    )
        found[f"{ours}.feed_forward_norm.weight"] = same(f"{theirs}.post_attention_layernorm.weight", dim)
        found[f"{ours}.feed_forward.experts.0.w13"] = Parts(
            "columns",
            (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
            ((width, dim), (width, dim)),
            (1, dim, 2 * width),
        )
        found[f"{ours}.feed_forward.experts.0.w2"] = Parts(
            "columns", (f"{theirs}.mlp.down_proj.weight",), ((dim, width),), (1, width, dim)
        )
    found["norm.weight"] = same("model.norm.weight", dim)
    found["head.weight"] = same("lm_head.weight", vocab_size, dim)
    return found


def join(parts: Parts, tensors: Sequence[Tensor]) -> Tensor:
    """Our tensor of theirs, contiguous; heads that share a QK-norm give the first one's."""
    if parts.how == "rows":
        return torch.cat(list(tensors))
    if parts.how == "columns":
        return torch.cat([tensor.T for tensor in tensors], dim=1)[None]
    if parts.how == "heads":
        return tensors[0][: parts.own[0], None].contiguous()
    return tensors[0]


def take_apart(parts: Parts, tensor: Tensor) -> list[Tensor]:
    """Their tensors of ours, contiguous: the inverse of `join`."""
    if parts.how == "rows":
        found = list(tensor.split([rows for rows, _ in parts.shapes]))
    elif parts.how == "columns":
        found = [part.T for part in tensor[0].split([rows for rows, _ in parts.shapes], dim=1)]
    elif parts.how == "heads":
        found = [tensor[:, 0].expand(parts.shapes[0])]
    else:
        found = [tensor]
    return [part.contiguous() for part in found]


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_JSON` bytes; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"got {path.parent} without {path.name}, need a whole checkpoint: copy it again")
    return schema.read_json(path, MAX_JSON)


def model_of(config: Mapping[str, Any], shared_qk_norm: bool) -> ModelConfig:
    """Our sizes and wiring of a `config.json`; ValueError for a key or value that has no counterpart.

    `shared_qk_norm`: whether the heads of a layer share one QK-norm, which the file does not say.
    """
    if config.get("model_type") != "chameleon":
        raise ValueError(
            f"got {CONFIG} of model_type={config.get('model_type')}, need chameleon: give another checkpoint"
        )
    rope = config.get("rope_parameters") or {}
    for key, allowed in _HAS.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"got {key}={config[key]} in {CONFIG}, need {allowed[0]}: our decoder has no other")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"got rope_type={rope['rope_type']} in {CONFIG}, need default: our decoder has no scaled positions"
        )
    dim, n_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if config.get("head_dim") not in (None, dim // n_heads):
        raise ValueError(
            f"got head_dim={config['head_dim']} in {CONFIG}, need hidden_size / num_attention_heads = "
            f"{dim // n_heads}: our decoder has no other"
        )
    return ModelConfig(
        dim=dim,
        n_layers=integer(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=integer(config, "num_key_value_heads"),
        hidden_dim=integer(config, "intermediate_size"),
        norm_order="swin" if config.get("swin_norm") else "pre",
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        qk_norm="shared" if shared_qk_norm else "per_head",
        rope_theta=number({**config, **rope}, "rope_theta", 10_000.0),
    )


def integer(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1 from a configuration; ValueError for anything else."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"got {key}={value} in the checkpoint's configuration, need a whole number from 1: correct it")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number from a configuration; ValueError for anything else."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"got {key}={value} in the checkpoint's configuration, need a positive number: correct it")
    return float(value)


def config_of(model: ModelConfig, vocab: Vocabulary, max_positions: int) -> dict[str, Any]:
    """A `config.json` for a model that did not come from one.

    `vq_config` is the smallest picture tokenizer of as many codes that the library builds: a place for one, to be fed
    with token ids alone.
    """
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": vocab.size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "model_parallel_size": 1,
        "swin_norm": model.norm_order == "swin",
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.pad,
        "vq_config": {
            "num_embeddings": vocab.image_stop - vocab.image_start,
            "embed_dim": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "resolution": 2 * max(vocab.image_grid),
        },
        "vocabulary_map": vocabulary_map(vocab),
    }


_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_STRUCTURE = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "eoi": "<eoss>", "boi": "<racm3:break>"}


def vocabulary_map(vocab: Vocabulary) -> dict[str, int]:
    """Ids by Chameleon's names: special tokens, image codes, and `<image>` at the first id without a meaning."""
    names = {name: getattr(vocab, field) for field, name in _STRUCTURE.items()}
    taken = {*names.values(), *range(vocab.image_start, vocab.image_stop), *range(vocab.text_start, vocab.text_stop)}
    for _, start, stop in vocab.extra_modalities:
        taken |= {*range(start, stop)}
    free = [i for i in range(vocab.image_stop, vocab.size) if i not in taken]
    codes = range(vocab.image_stop - vocab.image_start)
    names |= {f"IMGIMG{str(code).translate(_LETTERS)}Z": vocab.image_start + code for code in codes}
    return names | ({"<image>": free[0]} if free else {})


def check_vocabulary(config: Mapping[str, Any], vocab: Vocabulary, tokenizer: str) -> None:
    """Raise ValueError unless the ids of a tokenizer asset mean what they mean in the checkpoint."""
    if (size := config.get("vocab_size")) != vocab.size:
        raise ValueError(
            f"got tokenizer={tokenizer} of {vocab.size} ids, need the checkpoint's {size}: give the asset it was "
            "trained with"
        )
    names = config.get("vocabulary_map") or {}
    if not isinstance(names, dict):
        raise ValueError(f"got vocabulary_map={names!r:.40} in {CONFIG}, need an object: copy the file again")
    pairs = [(name, names[name], getattr(vocab, field)) for field, name in _STRUCTURE.items() if name in names]
    codes = {}
    for name, i in names.items():
        if code := re.fullmatch(r"IMGIMG([A-J]{1,9})Z", name):
            codes[int(code[1].translate(_DIGITS))] = i
            pairs.append((name, i, vocab.image_start + int(code[1].translate(_DIGITS))))
    n_codes = vocab.image_stop - vocab.image_start
    if codes and sorted(codes) != list(range(n_codes)):
        raise ValueError(
            f"got tokenizer={tokenizer} of {n_codes} image codes, need the checkpoint's {len(codes)}: give the asset "
            "it was trained with"
        )
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"got tokenizer={tokenizer} where {name} is {ours}, need the checkpoint's {theirs}: give the asset it "
                "was trained with"
            )


# ---- folders of safetensors -----------------------------------------------------------------------------------------


class Form(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Folder(NamedTuple):
    """The tensors of a folder by name: the file each one lies in, and its form."""

    files: dict[str, Path]
    forms: dict[str, Form]


def open_folder(folder: Path) -> Folder:
    """Read index and headers of a folder of safetensors, no tensor.

    Raises ValueError for a folder of pickles, a damaged or missing file, an index that names a file elsewhere, and
    one that does not name what the files hold.
    """
    if (folder / INDEX).is_file():
        indexed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(indexed, dict) or not indexed:
            raise ValueError(f"got {folder / INDEX} without a weight_map, need a whole file: copy it again")
        for name, file in indexed.items():
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
                raise ValueError(
                    f"got {folder / INDEX} that puts {name} into {file!r}, need a .safetensors file in the same "
                    "folder: it may be harmful, do not load it"
                )
        files = sorted(set(indexed.values()))
    elif (folder / WEIGHTS).is_file():
        indexed, files = None, [WEIGHTS]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"{pickles[0]}, a pickle," if pickles else f"no {WEIGHTS}"
        raise ValueError(
            f"got {found} in {folder}, need safetensors: save the checkpoint anew with safe_serialization=True where "
            "you trust it"
        )
    opened = open_files([folder / file for file in files])
    if indexed is not None:
        where = {name: path.name for name, path in opened.files.items()}
        wrong = sorted(name for name in indexed.keys() | where.keys() if indexed.get(name) != where.get(name))
        if wrong:
            raise ValueError(
                f"got {folder / INDEX} that is wrong about {wrong[0]} and {len(wrong) - 1} more tensors, need the "
                "index of these files: copy the folder again"
            )
    return opened


def open_files(paths: Sequence[Path]) -> Folder:
    """Read the headers of safetensors files; ValueError for one that is damaged or missing, and for a name in two."""
    where: dict[str, Path] = {}
    forms: dict[str, Form] = {}
    for path in paths:
        for name, form in _headers(path).items():
            if name in forms:
                raise ValueError(
                    f"got {name} in {where[name].name} and in {path.name}, need it once: copy {path.parent} again"
                )
            where[name], forms[name] = path, form
    return Folder(where, forms)


def _headers(path: Path) -> dict[str, Form]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            for name, part in slices.items():
                if part.get_dtype() not in _DTYPES:
                    raise ValueError(f"got {name} as {part.get_dtype()} in {path}, need a plain dtype: convert it")
            return {name: Form(tuple(part.get_shape()), _DTYPES[part.get_dtype()]) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"got a damaged or missing {path} ({error}), need a whole file: copy it again") from error


def fetch(folder: Folder, name: str) -> Tensor:
    """One tensor on the CPU, with memory of its own: no file stays mapped behind it."""
    path = folder.files[name]
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"got a damaged {path} ({error}), need a whole file: copy it again") from error


def check_tensors(forms: Mapping[str, Form], wanted: Mapping[str, Parts], where: str) -> None:
    """Raise ValueError unless a checkpoint holds exactly the decoder's tensors, in their shapes and a float dtype.

    Those of the picture tokenizer may stand beside them.
    """
    shapes = {name: shape for parts in wanted.values() for name, shape in zip(parts.names, parts.shapes, strict=True)}
    own = {name for name in forms if not name.startswith(VQ_PREFIX)}
    for names, what in ((shapes.keys() - own, "lacks"), (own - shapes.keys(), "also holds")):
        if names:
            raise ValueError(
                f"got {where}, which {what} {min(names)} and {len(names) - 1} more tensors, need those of its "
                "configuration: copy the whole checkpoint, or correct the configuration"
            )
    for name, shape in shapes.items():
        if forms[name].shape != shape:
            raise ValueError(
                f"got {name} as {forms[name].shape} in {where}, need {shape}: correct the configuration, or copy the "
                "checkpoint again"
            )
        if forms[name].dtype not in NAMES:
            raise ValueError(
                f"got {name} as {str(forms[name].dtype).removeprefix('torch.')} in {where}, need "
                f"{', '.join(NAMES.values())}: convert it"
            )


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form strings in the header of a safetensors file; ValueError for one that is damaged or missing."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"got a damaged or missing {path} ({error}), need a whole file: copy it again") from error


def write_lazily(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> int:
    """One safetensors file, fsynced, of tensors of which one at a time is in memory; returns their bytes.

        8 bytes: n   |   n bytes: JSON of names, dtypes, shapes, places   |   the tensors, little-endian, gapless

    Wide dtypes come first, so that each tensor begins at a multiple of its width. Raises ValueError for a dtype that
    the format has no name for.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        form = Form(tensors[name].shape, tensors[name].dtype)
        if form.dtype not in names:
            raise ValueError(f"got {name} as {form.dtype}, need one of {', '.join(map(str, names))}: convert it")
        start, stop = stop, stop + form.n_bytes
        header[name] = {"dtype": names[form.dtype], "shape": list(form.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            file.write(tensors[name].fetch().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return stop


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file with what transformers asks of its header."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
