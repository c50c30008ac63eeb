"""Import: a Chameleon checkpoint -> a run folder at step 0, to be upcycled, trained on, evaluated, generated from.

    config.json, *.safetensors [index]                   Hugging Face's layout: moma/hf_chameleon.py
    params.json, consolidated*.pth                       Meta's layout, ranks put together: moma/meta_chameleon.py
        -> RUN/checkpoints/step-00000000/                the decoder, fp32
           RUN/hf/                                       vqmodel's tensors, config.json and the other small files

Weights become fp32 masters, which hold bf16 and fp16 exactly; `meta.json` keeps the stored dtypes, so `moma export_hf`
gives every bit back. One tensor at a time is in memory, whatever the size of the checkpoint; the folder takes twice
the disk of a bf16 one. The picture tokenizer's tensors are no part of the run: they wait in `hf/` as they came, where
`moma.vqgan.convert.read_hf` reads them.

`tokenizer_files` makes the tokenizer asset first, of the checkpoint's own files: `text_tokenizer.json`, `vqgan.ckpt`
and `vqgan.yaml` in Meta's layout, `tokenizer.json` and the folder's vqmodel in Hugging Face's (which has no decoder:
such an asset encodes pictures and draws none).

`qk_norm` auto: shared where all heads of every layer hold the same bits, as in a model trained on one rank, else
`per_head`. `precision` auto: bf16 for weights stored in 16 bits; what upcycled runs inherit.

An import has no data, no optimizer, no history: `moma upcycle seed_run=RUN` and `moma train init_from=RUN` begin their
own. Refuses a tokenizer asset whose ids mean something else than the checkpoint's, and what the two layouts refuse.
"""

import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moma import checkpoint, hf_chameleon, meta_chameleon
from moma.config import Composed, plain
from moma.hf_chameleon import CONFIG, NAMES, VQ_PREFIX, WEIGHTS, Form, Parts
from moma.meter import Meter
from moma.modality import Vocabulary
from moma.model.transformer import Architecture, ModelConfig
from moma.objectives import NextTokenConfig
from moma.run import git_state, provenance
from moma.tokenizer.chameleon import chameleon_asset, read_vocabulary_file, vocabulary_of
from moma.tokenizer.vocab import asset_folder, load_vocabulary
from moma.vqgan.convert import read_hf, read_taming
from moma.vqgan.model import save_vq

BESIDE = "hf"  # in a run folder: what export puts back as it is
# Small files of a Hugging Face folder that travel along.
CARRIED = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class ImportHfConfig:
    """`source`: the folder of the checkpoint; `tokenizer`: the asset whose ids are the checkpoint's.

    `tokenizer_files`: the folder of the files to make that asset of; null: it is there already.
    `run_dir` null: runs/imported/<name of the folder>. See the module docstring for the others.
    """

    source: Path
    tokenizer: str
    tokenizer_files: Path | None = None
    run_dir: Path | None = None
    qk_norm: Literal["auto", "shared", "per_head"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"


class Source(NamedTuple):
    """A checkpoint of either layout: its decoder in Hugging Face's names and forms, nothing read yet."""

    layout: Literal["hf", "meta"]
    model: ModelConfig  # QK-norm per head where the layout leaves it open
    config: dict[str, Any]  # of Hugging Face's keys, as far as the tokenizer's check needs them
    forms: dict[str, Form]
    fetch: Callable[[str], Tensor]


def main(composed: Composed) -> int:
    """`moma import_hf`: writes the run folder and prints how to go on; returns 0."""
    config: ImportHfConfig = composed.config
    run_dir = config.run_dir or Path("runs/imported") / config.source.resolve().name
    import_hf(config, run_dir)
    return 0


def import_hf(config: ImportHfConfig, run_dir: Path) -> dict[str, Any]:
    """Write the run folder; returns the `imported` record of its meta.json.

    Raises ValueError for a checkpoint that is damaged, incomplete or of another kind, a tokenizer that does not fit,
    and a run folder that holds a checkpoint. Nothing is left behind where it refuses what the headers say.
    """
    if (run_dir / BESIDE).resolve() == config.source.resolve():
        raise ValueError(
            f"got run_dir={run_dir}, which would overwrite {config.source}, need another folder: change it"
        )
    source = open_source(config.source)
    if config.tokenizer_files is not None:
        make_asset(config.tokenizer_files, Path(config.tokenizer))
    vocab = load_vocabulary(asset_folder(config.tokenizer))
    hf_chameleon.check_vocabulary(source.config, vocab, config.tokenizer)
    where = str(config.source)
    hf_chameleon.check_tensors(source.forms, hf_chameleon.layout(source.model, vocab.size), where)
    model = source.model
    if model.qk_norm != "none":
        model = replace(model, qk_norm=_qk_norm(source, model, vocab.size, config.qk_norm))
    parts = hf_chameleon.layout(model, vocab.size)
    dtypes = {name: source.forms[name].dtype for part in parts.values() for name in part.names}
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if torch.float32 in dtypes.values() else "bf16"
    (stored, _), *_ = Counter(dtypes.values()).most_common(1)
    imported = {
        "source": where,
        "layout": source.layout,
        "dtype": NAMES[stored],
        "other_dtypes": {name: NAMES[dtype] for name, dtype in dtypes.items() if dtype != stored},
    }
    identity = {
        **plain(Architecture(model)),
        "objective": plain(NextTokenConfig()),
        "tokenizer": config.tokenizer,
        "precision": precision,
        "vocab_hash": vocab.hash,
    }
    with checkpoint.alone(run_dir):
        if checkpoint.latest(run_dir / "checkpoints"):
            raise ValueError(
                f"got a checkpoint in {run_dir}, need a new run folder: set another run_dir, or remove the folder"
            )
        if source.layout == "hf":
            carry(config.source, run_dir / BESIDE)
        checkpoint.save_lazily(
            run_dir / "checkpoints",
            0,
            {f"model/{name}": lazy(part, source.fetch) for name, part in parts.items()},
            {
                **provenance(identity, git_state()),
                "data": None,
                "meter": Meter().state(),
                "upcycled": None,
                "imported": imported,
            },
        )
    n_parameters = sum(torch.Size(part.own).numel() for part in parts.values())
    settings = plain(model)
    print(
        f"{run_dir}: {n_parameters / 1e6:.2f} M parameters, stored as {imported['dtype']}, {source.layout} layout\n"
        f"its settings, for `moma upcycle seed_run={shlex.quote(str(run_dir))}` and `moma train init_from=...`:\n  "
        + shlex.join([f"tokenizer={config.tokenizer}", *(f"model.{key}={value}" for key, value in settings.items())])
    )
    return imported


def make_asset(files: Path, out: Path) -> Vocabulary:
    """Make the tokenizer asset `out` of Chameleon's own files, in either layout; returns its vocabulary.

    Raises ValueError for files that are missing or damaged, codes that are not those of the vocabulary, and for an
    asset that is there already.
    """
    text = [name for name in ("text_tokenizer.json", "tokenizer.json") if (files / name).is_file()]
    if len(text) != 1:
        raise ValueError(
            f"got {files} with {' and '.join(text) or 'no vocabulary file'}, need text_tokenizer.json (Meta) or "
            "tokenizer.json (Hugging Face): give the folder that holds one of them"
        )
    if text == ["text_tokenizer.json"]:
        pictures = read_taming(files / "vqgan.ckpt", files / "vqgan.yaml")
    else:
        pictures = read_hf(files)
    vocab = vocabulary_of(read_vocabulary_file(files / text[0]), pictures.config.grid)
    n_codes = vocab.image_stop - vocab.image_start
    if n_codes != pictures.config.n_embed:
        raise ValueError(
            f"got {n_codes} image codes in {files / text[0]} and {pictures.config.n_embed} in the picture tokenizer, "
            "need equal numbers: take the files of one model"
        )
    chameleon_asset(files / text[0], out, pictures.config.grid)
    save_vq(pictures, out)
    return load_vocabulary(out)


def open_source(folder: Path) -> Source:
    """Find out the layout of a checkpoint and read what describes it; ValueError for what is neither, or both."""
    found = [name for name in (CONFIG, meta_chameleon.PARAMS) if (folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"got source={folder} with {' and '.join(found) or f'no {CONFIG}'}, need a folder with {CONFIG} (Hugging "
            f"Face) or {meta_chameleon.PARAMS} (Meta): give the folder that holds the weights of one model"
        )
    if found == [CONFIG]:
        for name in CARRIED:
            if (folder / name).is_file() and (folder / name).stat().st_size > hf_chameleon.MAX_JSON:
                raise ValueError(
                    f"got {folder / name} of more than {hf_chameleon.MAX_JSON} bytes, need a small file: copy it again"
                )
        config = hf_chameleon.read_json(folder / CONFIG)
        model = hf_chameleon.model_of(config, shared_qk_norm=False)
        files = hf_chameleon.open_folder(folder)
        return Source("hf", model, config, files.forms, lambda name: hf_chameleon.fetch(files, name))
    params = meta_chameleon.read_params(folder)
    model = meta_chameleon.model_of(params)
    ranks = meta_chameleon.open_ranks(folder, params)
    forms = meta_chameleon.forms_of(ranks, model)
    head = forms.get("lm_head.weight")
    config = {"vocab_size": head.shape[0] if head else params.get("vocab_size")}
    return Source("meta", model, config, forms, lambda name: meta_chameleon.fetch(ranks, model, name))


def _qk_norm(
    source: Source, model: ModelConfig, vocab_size: int, wanted: Literal["auto", "shared", "per_head"]
) -> Literal["shared", "per_head"]:
    """Whether heads share QK-norms; ValueError where they are wanted shared and differ."""
    if wanted == "per_head":
        return "per_head"
    for part in hf_chameleon.layout(model, vocab_size).values():
        if part.how == "heads":
            tensor = source.fetch(part.names[0])
            if not torch.equal(tensor, tensor[:1].expand_as(tensor)):
                if wanted == "shared":
                    raise ValueError(
                        f"got qk_norm=shared and heads that differ in {part.names[0]}, need per_head: leave qk_norm out"
                    )
                return "per_head"
    return "shared"


def lazy(part: Parts, fetch: Callable[[str], Tensor]) -> checkpoint.Lazy:
    """Our tensor, in fp32, to be made when it is written."""

    def made() -> Tensor:
        return hf_chameleon.join(part, [fetch(name).float() for name in part.names])

    return checkpoint.Lazy(part.own, torch.float32, made)


def carry(source: Path, beside: Path) -> None:
    """Copy the small files and the picture tokenizer's tensors of a Hugging Face folder into a run folder.

    Replaces those of an import that was stopped, and nothing else.
    """
    beside.mkdir(parents=True, exist_ok=True)
    for name in (*CARRIED, WEIGHTS):
        (beside / name).unlink(missing_ok=True)
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, beside / name)
    files = hf_chameleon.open_folder(source)
    pictures = [name for name in files.files if name.startswith(VQ_PREFIX)]
    if pictures:
        hf_chameleon.write_file(beside / WEIGHTS, {name: hf_chameleon.fetch(files, name) for name in pictures})
