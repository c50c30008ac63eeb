"""The vocabulary file of a tokenizer asset: `vocab.json` -> `Vocabulary`.

    tokenizers/<name>/   vocab.json   text.tiktoken   vqgan.json   vqgan.safetensors   SHA256SUMS   README.md

    ids  bos pad eos unk | image codes | eoi boi | special tokens, reserved to a multiple of 64 | text

The text half is `text.tiktoken`, or in its place `text_tokenizer.json` (a vocabulary as Chameleon's, which has a
layout of its own: `moma/tokenizer/chameleon.py`).

`special_tokens` are ids with a name and no text, such as the separator `<sep>` that ends a turn of a dialogue: a
source puts them into a document, nothing in data can spell them. They and the cutting of text into words
(`TextOptions`) stand in `vocab.json` only where they are not the default.

The hash names the text half, the image tokenizer and what `vocab.json` says together, by content: retraining
either tokenizer changes it, and every shard and checkpoint made before is refused. A folder without an image
tokenizer is a text-only asset and has a hash of its own.

Refuses ranges and special tokens that overlap or leave the vocabulary, half of an image tokenizer, and two text
halves.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from moma.modality import Vocabulary
from moma.schema import build, read_json

FORMAT = 1
VOCAB_FILE = "vocab.json"
RANKS_FILE = "text.tiktoken"
JSON_FILE = "text_tokenizer.json"
MAX_VOCAB_BYTES = 2**20
IMAGE_FILES = ("vqgan.json", "vqgan.safetensors")
_PACKAGE = Path(__file__).resolve().parents[1]
# Working folder, checkout, installed wheel.
_SHELVES = (Path("tokenizers"), _PACKAGE.parent / "tokenizers", _PACKAGE / "_share" / "tokenizers")


@dataclass(frozen=True)
class TextOptions:
    """How text is cut into words (`moma/tokenizer/text.py`), and the ids of special tokens by name."""

    digits: Literal["single", "triple"] = "single"
    whitespace: Literal["grouped", "single"] = "grouped"
    special_tokens: dict[str, int] = field(default_factory=dict)


def asset_folder(tokenizer: str | Path) -> Path:
    """The folder of a tokenizer asset: a path, or a name under ./tokenizers or the one shipped with moma.

    Raises ValueError with the nearest name if there is none.
    """
    for folder in (Path(tokenizer), *(shelf / tokenizer for shelf in _SHELVES)):
        if (folder / VOCAB_FILE).is_file():
            return folder
    known = sorted({path.parent.name for shelf in _SHELVES for path in shelf.glob(f"*/{VOCAB_FILE}")})
    near = difflib.get_close_matches(Path(tokenizer).name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {known} or give its path"
    raise ValueError(f"got tokenizer {str(tokenizer)!r}, need a folder with a {VOCAB_FILE}: {hint}")


def load_vocabulary(folder: Path) -> Vocabulary:
    """Read `vocab.json` and hash the asset.

    Raises ValueError for missing files, an unknown format, unknown or missing fields, wrong types, and ranges
    that do not fit.
    """
    vocab, options = _read(Path(folder))
    return replace(vocab, hash=_asset_hash(Path(folder), vocab, options))


def text_options(folder: Path) -> TextOptions:
    """The text options in an asset's `vocab.json`; ValueError as `load_vocabulary`."""
    return _read(Path(folder))[1]


def write_vocabulary(
    folder: Path,
    *,
    text_size: int,
    image_codes: int,
    image_grid: tuple[int, int],
    multiple: int = 64,
    digits: Literal["single", "triple"] = "single",
    whitespace: Literal["grouped", "single"] = "grouped",
    special_tokens: Sequence[str] = (),
) -> Vocabulary:
    """Lay the ids out, write `vocab.json` beside an existing `text.tiktoken` and return what was written.

    `text_size` text tokens, `image_codes` codes on a grid of `image_grid` (rows, columns); `special_tokens` get
    the ids behind begin of image, in order. The text range starts at the next multiple of `multiple`, so that the
    embedding table's parts are aligned.
    """
    if multiple < 1:
        raise ValueError(f"got multiple={multiple}, need at least 1: use 64")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"got special tokens {list(special_tokens)}, need each name once: drop the second")
    image_start = 4  # bos 0, pad 1, eos 2, unk 3 (a byte-level BPE never needs it)
    image_stop = image_start + image_codes
    special_start = image_stop + 2
    text_start = -(-(special_start + len(special_tokens)) // multiple) * multiple
    vocab = Vocabulary(
        size=text_start + text_size,
        bos=0,
        pad=1,
        eos=2,
        boi=image_stop + 1,
        eoi=image_stop,
        image_start=image_start,
        image_stop=image_stop,
        text_start=text_start,
        text_stop=text_start + text_size,
        image_grid=image_grid,
        hash="",
    )
    specials = {name: special_start + i for i, name in enumerate(special_tokens)}
    return save_vocabulary(folder, vocab, TextOptions(digits, whitespace, specials))


def save_vocabulary(folder: Path, vocab: Vocabulary, options: TextOptions) -> Vocabulary:
    """Check and write `vocab.json` beside an existing text half; returns the vocabulary with the asset's hash."""
    check_vocabulary(vocab, options.special_tokens)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / VOCAB_FILE).write_text(json.dumps(_stored(vocab, options), indent=1) + "\n")
    return load_vocabulary(folder)


def check_vocabulary(vocab: Vocabulary, special_tokens: Mapping[str, int] | None = None) -> None:
    """Raise ValueError unless ranges and special tokens lie inside the vocabulary and no id has two meanings."""
    specials = special_tokens or {}
    if "" in specials:
        raise ValueError(f"got a special token without a name, need one like <sep>: name id {specials['']}")
    ranges = {
        "image": (vocab.image_start, vocab.image_stop),
        "text": (vocab.text_start, vocab.text_stop),
        **{name: (start, stop) for name, start, stop in vocab.extra_modalities},
        **{name: (getattr(vocab, name), getattr(vocab, name) + 1) for name in ("bos", "pad", "eos", "boi", "eoi")},
        **{f"special token {name!r}": (id_, id_ + 1) for name, id_ in specials.items()},
    }
    for name, (start, stop) in ranges.items():
        if not 0 <= start < stop <= vocab.size:
            raise ValueError(
                f"got {name} ids [{start}, {stop}), need a range inside [0, {vocab.size}): correct {VOCAB_FILE}"
            )
    ordered = sorted(ranges.items(), key=lambda item: item[1])
    for (name, (_, stop)), (other, (start, _)) in zip(ordered, ordered[1:], strict=False):
        if start < stop:
            raise ValueError(f"got {name} and {other} ids that overlap at {start}, need one meaning: move one")
    if min(vocab.image_grid, default=0) < 1 or len(vocab.image_grid) != 2:
        raise ValueError(f"got image_grid {vocab.image_grid}, need (rows, columns): give both, at least 1")


def _read(folder: Path) -> tuple[Vocabulary, TextOptions]:
    path = folder / VOCAB_FILE
    text_halves = [name for name in (RANKS_FILE, JSON_FILE) if (folder / name).is_file()]
    if not path.is_file() or not text_halves:
        raise ValueError(
            f"got folder {folder} without {VOCAB_FILE} or {RANKS_FILE}, need both: "
            "check the tokenizer's path, or make one by train_bpe"
        )
    if len(text_halves) == 2:
        raise ValueError(f"got {' and '.join(text_halves)} in {folder}, need one text half: remove the other")
    present = [name for name in IMAGE_FILES if (folder / name).is_file()]
    if len(present) == 1:
        raise ValueError(
            f"got {present[0]} alone in {folder}, need {' and '.join(IMAGE_FILES)} together: "
            "copy the other one, or remove it"
        )
    stored = read_json(path, MAX_VOCAB_BYTES)
    if stored.pop("format", None) != FORMAT:
        raise ValueError(f"got another format of {path}, need format {FORMAT}: train the tokenizer again")
    chosen = {f.name: stored.pop(f.name) for f in fields(TextOptions) if f.name in stored}
    need = {f.name for f in fields(Vocabulary)} - {"hash"}
    if set(stored) != need:
        raise ValueError(
            f"got {path} with unknown fields {sorted(set(stored) - need)} and without "
            f"{sorted(need - set(stored))}, need exactly {sorted(need)}: correct the file"
        )
    vocab = build(Vocabulary, {**stored, "hash": ""}, str(path))
    options = build(TextOptions, chosen, str(path))
    if text_halves == [JSON_FILE] and (options.digits, options.whitespace) != ("single", "grouped"):
        raise ValueError(f"got digits or whitespace in {path}, need neither: {JSON_FILE} cuts text by its own rule")
    check_vocabulary(vocab, options.special_tokens)
    return vocab, options


def _stored(vocab: Vocabulary, options: TextOptions) -> dict[str, Any]:
    ranges = asdict(vocab)
    del ranges["hash"]
    # Defaults are left out: they are older than the fields, and assets made before keep their hash.
    default = asdict(TextOptions())
    chosen = {name: value for name, value in asdict(options).items() if value != default[name]}
    return {"format": FORMAT, **ranges, **chosen}


def _asset_hash(folder: Path, vocab: Vocabulary, options: TextOptions) -> str:
    digest = hashlib.sha256()
    canonical = json.dumps(_stored(vocab, options), sort_keys=True, separators=(",", ":")).encode()
    text_half = RANKS_FILE if (folder / RANKS_FILE).is_file() else JSON_FILE
    for part in (canonical, *(_bytes_of(folder / name) for name in (text_half, *IMAGE_FILES))):
        # The length in front, so that no byte can move from one part to the next unseen.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
