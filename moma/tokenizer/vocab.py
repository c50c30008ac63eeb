"""The vocabulary file of a tokenizer asset: `vocab.json` -> `Vocabulary`.

    tokenizers/<name>/   vocab.json   text.tiktoken   vqgan.json   vqgan.safetensors   SHA256SUMS   README.md

    ids  bos pad eos unk | image codes | eoi boi | reserved to a multiple of 64 | text

The hash names the text ranks, the image tokenizer and the id ranges together, by content: retraining either
tokenizer changes it, and every shard and checkpoint made before is refused. A folder without an image
tokenizer is a text-only asset and has a hash of its own.

Refuses ranges that overlap or leave the vocabulary, and half of an image tokenizer.
"""

import difflib
import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from moma.modality import Vocabulary
from moma.tokenizer.text import RANKS_FILE

FORMAT = 1
VOCAB_FILE = "vocab.json"
IMAGE_FILES = ("vqgan.json", "vqgan.safetensors")
_PACKAGE = Path(__file__).resolve().parents[1]
# Working folder, checkout, installed wheel.
_SHELVES = (Path("tokenizers"), _PACKAGE.parent / "tokenizers", _PACKAGE / "_share" / "tokenizers")


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

    Raises ValueError for missing files, an unknown format, unknown or missing fields, and ranges that do not
    fit.
    """
    folder = Path(folder)
    path = folder / VOCAB_FILE
    if not path.is_file() or not (folder / RANKS_FILE).is_file():
        raise ValueError(
            f"got folder {folder} without {VOCAB_FILE} or {RANKS_FILE}, need both: "
            "check the tokenizer's path, or make one by train_bpe"
        )
    present = [name for name in IMAGE_FILES if (folder / name).is_file()]
    if len(present) == 1:
        raise ValueError(
            f"got {present[0]} alone in {folder}, need {' and '.join(IMAGE_FILES)} together: "
            "copy the other one, or remove it"
        )
    stored = json.loads(path.read_text())
    if stored.pop("format", None) != FORMAT:
        raise ValueError(f"got another format of {path}, need format {FORMAT}: train the tokenizer again")
    need = {field.name for field in fields(Vocabulary)} - {"hash"}
    if set(stored) != need:
        raise ValueError(
            f"got {path} with unknown fields {sorted(set(stored) - need)} and without "
            f"{sorted(need - set(stored))}, need exactly {sorted(need)}: correct the file"
        )
    stored["image_grid"] = tuple(stored["image_grid"])
    stored["extra_modalities"] = tuple((n, a, b) for n, a, b in stored["extra_modalities"])
    vocab = Vocabulary(**stored, hash="")
    check_vocabulary(vocab)
    return replace(vocab, hash=_asset_hash(folder, vocab))


def write_vocabulary(
    folder: Path,
    *,
    text_size: int,
    image_codes: int,
    image_grid: tuple[int, int],
    multiple: int = 64,
) -> Vocabulary:
    """Lay the ids out, write `vocab.json` beside an existing `text.tiktoken` and return what was written.

    `text_size` text tokens, `image_codes` codes on a grid of `image_grid` (rows, columns); the text range
    starts at the next multiple of `multiple`, so that the embedding table's parts are aligned.
    """
    if multiple < 1:
        raise ValueError(f"got multiple={multiple}, need at least 1: use 64")
    image_start = 4  # bos 0, pad 1, eos 2, unk 3 (a byte-level BPE never needs it)
    image_stop = image_start + image_codes
    text_start = -(-(image_stop + 2) // multiple) * multiple
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
    check_vocabulary(vocab)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / VOCAB_FILE).write_text(json.dumps(_stored(vocab), indent=1) + "\n")
    return load_vocabulary(folder)


def check_vocabulary(vocab: Vocabulary) -> None:
    """Raise ValueError unless ranges lie inside the vocabulary and no id has two meanings."""
    ranges = {
        "image": (vocab.image_start, vocab.image_stop),
        "text": (vocab.text_start, vocab.text_stop),
        **{name: (start, stop) for name, start, stop in vocab.extra_modalities},
        **{name: (getattr(vocab, name), getattr(vocab, name) + 1) for name in ("bos", "pad", "eos", "boi", "eoi")},
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


def _stored(vocab: Vocabulary) -> dict:
    ranges = asdict(vocab)
    del ranges["hash"]
    return {"format": FORMAT, **ranges}


def _asset_hash(folder: Path, vocab: Vocabulary) -> str:
    digest = hashlib.sha256()
    canonical = json.dumps(_stored(vocab), sort_keys=True, separators=(",", ":")).encode()
    for part in (canonical, *(_bytes_of(folder / name) for name in (RANKS_FILE, *IMAGE_FILES))):
        # The length in front, so that no byte can move from one part to the next unseen.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
