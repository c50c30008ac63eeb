"""`moma generate`: the newest checkpoint of a run draws pictures of names and names pictures.

    prompts, held-out names        BOS name BOI          -> codes EOI   -> <number>-<name>-<sample>.png
    pictures, held-out pictures    BOS BOI codes EOI     -> text EOS    -> generations.json
                                                            all of it  --> generations.json, grid.png

Every sample of every prompt runs in one batch (cut at `batch_rows`, which changes no draw). Writes into
`<run>/generations` unless told otherwise. Refuses routing modes that see the future, and pictures as PNG where the
tokenizer has no image part (`write=codes` keeps the codes). File names are made of letters, digits and dashes: nothing
in a prompt or a corpus can leave the folder.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from moma.config import Composed
from moma.data.shards import open_corpus, write_json
from moma.distributed import autocast, choose_device
from moma.evaluation.pictures import NamedPicture, named_pictures
from moma.evaluation.runs import LoadedRun, load_run
from moma.generation.interleaved import Generation, causal_mode, generate
from moma.generation.kv_cache import for_decoding
from moma.generation.sampling import Sampling
from moma.model.feed_forward import Mode
from moma.tokenizer.image import ImageTokenizer, open_image
from moma.tokenizer.text import TextTokenizer
from moma.tokenizer.vocab import IMAGE_FILES

DRAW, NAME = "picture", "caption"
_LABEL_WIDTH, _GAP = 160, 4


@dataclass(frozen=True)
class GenerateConfig:
    """`prompts`: names to draw; `pictures`: files to name; `held_out`: so many pairs of the val split, both ways.

    `samples` of each. `guidance`, `guidance_image`: see `moma/generation/interleaved.py`. `write`: pictures as
    PNG, or their codes as .npy. `precision` auto: the run's own. `out` null: <run>/generations.
    """

    run: Path
    prompts: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()
    held_out: int = 0
    samples: int = 4
    mode: Mode = "aux"
    text: Sampling = Sampling(0.7, top_p=0.9, repetition_penalty=1.2)
    picture: Sampling = Sampling(0.7, top_p=0.9)
    guidance: float = 3.0
    guidance_image: float | None = None
    max_text_tokens: int = 32
    seed: int = 0
    write: Literal["png", "codes"] = "png"
    batch_rows: int = 256
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("held_out", 0), ("samples", 1), ("max_text_tokens", 1), ("batch_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"got {name}={getattr(self, name)}, need at least {least}: change {name}")
        if not (self.prompts or self.pictures or self.held_out):
            raise ValueError(
                "got nothing to generate from, need prompts, pictures or held_out: add held_out=8, or "
                "prompts='[sheaf of rice]'"
            )


@dataclass(frozen=True)
class Prompt:
    """One prompt: `label` the name or the file's name, `tokens` from BOS on, `real` the codes it is known to have."""

    kind: str
    label: str
    tokens: list[int]
    held_out: bool
    real: np.ndarray | None = None


def main(composed: Composed) -> int:
    """`moma generate`: write pictures, grid and generations.json; returns 0."""
    config: GenerateConfig = composed.config
    device = choose_device(config.device)
    loaded = load_run(config.run, device)
    mode = causal_mode(loaded.model, config.mode)
    text = TextTokenizer.load(loaded.tokenizer, loaded.vocab)
    image = load_image_tokenizer(config, loaded.tokenizer, device)
    prompts = make_prompts(config, loaded, text, image)
    out = config.out or config.run / "generations"
    out.mkdir(parents=True, exist_ok=True)
    precision = loaded.precision if config.precision == "auto" else config.precision
    with autocast(precision, device):
        made = {kind: _generate(config, loaded, mode, kind, prompts) for kind in (DRAW, NAME)}
    records = _write_pictures(out, loaded, image if config.write == "png" else None, made[DRAW])
    records += _named(out, text, image if config.write == "png" else None, made[NAME])
    named_mode = mode if loaded.model.needs_future else "causal"  # the rest is causal as it is
    settings = {
        "run": str(config.run), "checkpoint": loaded.checkpoint.name, "step": loaded.step, "mode": named_mode,
        "seed": config.seed, "precision": precision, "samples": config.samples, "text": asdict(config.text),
        "picture": asdict(config.picture), "guidance": config.guidance,
        "guidance_image": config.guidance if config.guidance_image is None else config.guidance_image,
    }  # fmt: skip
    write_json(out / "generations.json", {**settings, "generations": records})
    print(
        f"{out}: {sum(r['kind'] == DRAW for r in records)} pictures, "
        f"{sum(r['kind'] == NAME for r in records)} names, mode {named_mode}, step {loaded.step} of {config.run}"
    )
    return 0


def load_image_tokenizer(config: GenerateConfig, folder: Path, device: torch.device) -> ImageTokenizer | None:
    """The asset's image tokenizer; None if it has none and none is needed. Raises ValueError if one is needed."""
    if all((folder / name).is_file() for name in IMAGE_FILES):
        return ImageTokenizer.load(folder, device)
    if config.pictures:
        raise ValueError(
            f"got pictures to name but no image tokenizer in {folder}, need {' and '.join(IMAGE_FILES)} to read "
            "them: run `moma train_vq`, or leave pictures out"
        )
    if config.write == "png" and (config.prompts or config.held_out):
        raise ValueError(
            f"got write=png but no image tokenizer in {folder}, need {' and '.join(IMAGE_FILES)} to make pictures "
            "of codes: run `moma train_vq`, or keep the codes with write=codes"
        )
    return None


def make_prompts(
    config: GenerateConfig, loaded: LoadedRun, text: TextTokenizer, image: ImageTokenizer | None
) -> list[Prompt]:
    """Prompts in the form of the corpus' documents; raises ValueError for what cannot be had."""
    pairs = _held_out(config, loaded, text) if config.held_out else []
    prompts = [_draw(name, None, text, loaded) for name in config.prompts]
    prompts += [_draw(pair.name, pair.codes, text, loaded) for pair in pairs]
    if config.pictures:
        assert image is not None
        opened = [open_image(path.read_bytes(), str(path)) for path in config.pictures]
        for path, codes in zip(config.pictures, image.encode(opened), strict=True):
            prompts.append(_name(path.name, codes, False, loaded))
    return prompts + [_name(pair.name, pair.codes, True, loaded) for pair in pairs]


def file_stem(number: int, label: str, sample: int | str) -> str:
    """<number>-<label in letters, digits and dashes, cut>-<sample>: unique, and never a path."""
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())[:40].strip("-")
    return "-".join(part for part in (f"{number:03d}", slug, str(sample)) if part)


def grid(rows: Sequence[tuple[str, Sequence[Image.Image | None]]], size: int) -> Image.Image:
    """One line per (label, pictures), each picture `size` pixels a side; None leaves its place empty."""
    columns = max(len(pictures) for _, pictures in rows)
    step = size + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * step, len(rows) * step + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (label, pictures) in enumerate(rows):
        top = _GAP + line * step
        # the built-in font knows Latin letters only
        words = label.encode("latin-1", "replace").decode("latin-1")
        pen.multiline_text((_GAP, top + size // 4), "\n".join(_wrapped(words)), fill="black")
        for column, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(picture.resize((size, size)), (_LABEL_WIDTH + column * step, top))
    return sheet


def _wrapped(words: str, width: int = 24, lines: int = 3) -> list[str]:
    found = [""]
    for word in words.split():
        if found[-1] and len(found[-1]) + len(word) >= width:
            found.append("")
        found[-1] = f"{found[-1]} {word}".strip()[:width]
    return found[:lines]


def _held_out(config: GenerateConfig, loaded: LoadedRun, text: TextTokenizer) -> list[NamedPicture]:
    """The first `held_out` pairs of distinct names, in an order drawn from the seed."""
    sources = open_corpus(loaded.corpus, "val", loaded.vocab.hash)
    by_name: dict[str, NamedPicture] = {}
    for pair in named_pictures(sources, text, loaded.vocab, config.seed):
        by_name.setdefault(pair.name, pair)
        if len(by_name) == config.held_out:
            break
    if len(by_name) < config.held_out:
        raise ValueError(
            f"got held_out={config.held_out}, need at most the {len(by_name)} names of the val split of "
            f"{loaded.corpus}: lower held_out"
        )
    return list(by_name.values())


def _draw(name: str, real: np.ndarray | None, text: TextTokenizer, loaded: LoadedRun) -> Prompt:
    if not name.strip():
        raise ValueError(f"got the prompt {name!r}, need words: leave it out")
    vocab = loaded.vocab
    return Prompt(DRAW, name, [vocab.bos, *text.encode(name), vocab.boi], real is not None, real)


def _name(label: str, codes: np.ndarray, held_out: bool, loaded: LoadedRun) -> Prompt:
    vocab = loaded.vocab
    ids = (codes + vocab.image_start).tolist()
    return Prompt(NAME, label, [vocab.bos, vocab.boi, *ids, vocab.eoi], held_out, codes)


def _generate(
    config: GenerateConfig, loaded: LoadedRun, mode: Mode, kind: str, prompts: list[Prompt]
) -> list[tuple[Prompt, list[Generation]]]:
    """All samples of all prompts of one kind."""
    here = [prompt for prompt in prompts if prompt.kind == kind]
    rows = [prompt.tokens for prompt in here for _ in range(config.samples)]
    limit = loaded.vocab.tokens_per_image + 1 if kind == DRAW else config.max_text_tokens
    made: list[Generation] = []
    model = for_decoding(loaded.model)  # once for all batches
    for start in range(0, len(rows), config.batch_rows):
        part = rows[start : start + config.batch_rows]
        made += generate(
            model, part, loaded.vocab,
            mode=mode, max_new_tokens=limit, text=config.text, picture=config.picture,
            guidance=config.guidance, guidance_image=config.guidance_image, pictures=False,
            seed=config.seed, rows=range(start, start + len(part)),
        )  # fmt: skip
    each = config.samples
    return [(prompt, made[i * each : (i + 1) * each]) for i, prompt in enumerate(here)]


def _write_pictures(
    out: Path, loaded: LoadedRun, image: ImageTokenizer | None, made: list[tuple[Prompt, list[Generation]]]
) -> list[dict[str, Any]]:
    """Files of all drawn pictures and the grid; the records of generations.json."""
    records, lines, vocab = [], [], loaded.vocab
    known = any(prompt.real is not None for prompt, _ in made)
    for number, (prompt, rows) in enumerate(made):
        codes = np.array([row.tokens[: vocab.tokens_per_image] for row in rows]) - vocab.image_start
        pictures = image.decode(codes) if image is not None else []
        real, real_file = _write_real(out, number, prompt, image)
        for sample in range(len(rows)):
            file = out / f"{file_stem(number, prompt.label, sample)}{'.png' if pictures else '.npy'}"
            if pictures:
                pictures[sample].save(file)
            else:
                np.save(file, codes[sample])
            records.append(_record(prompt, sample, file=file.name, real=real_file))
        lines.append((prompt.label, [*([real] if known else []), *pictures]))
    if image is not None and lines:
        grid(lines, image.size).save(out / "grid.png")
    return records


def _named(
    out: Path, text: TextTokenizer, image: ImageTokenizer | None, made: list[tuple[Prompt, list[Generation]]]
) -> list[dict[str, Any]]:
    """Records of the names given to pictures; the pictures themselves are written beside them."""
    records = []
    for number, (prompt, rows) in enumerate(made):
        _, real_file = _write_real(out, number, prompt, image)
        for sample, row in enumerate(rows):
            words = text.decode(row.tokens).strip()
            records.append(_record(prompt, sample, text=words, finished=row.finished, real=real_file))
    return records


def _write_real(
    out: Path, number: int, prompt: Prompt, image: ImageTokenizer | None
) -> tuple[Image.Image | None, str | None]:
    """The prompt's own picture as the tokenizer sees it, and its file; nothing where there is none."""
    if image is None or prompt.real is None:
        return None, None
    file = f"{file_stem(number, prompt.label, prompt.kind)}-real.png"
    (picture,) = image.decode(prompt.real[None])
    picture.save(out / file)
    return picture, file


def _record(prompt: Prompt, sample: int, **made: Any) -> dict[str, Any]:
    return {"kind": prompt.kind, "prompt": prompt.label, "held_out": prompt.held_out, "sample": sample, **made}
