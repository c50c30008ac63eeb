"""Chameleon's vocabulary file: Meta's `text_tokenizer.json`, or Hugging Face's `tokenizer.json`.

    ids  <s> <pad> </s> <unk> | IMGIMGAZ ... IMGIMGIBJBZ | <eoss> <racm3:break> | <reserved...> | text
         0   1     2    3     | 4 ...            8195    | 8196   8197          | ... 16383     | ... 65535

One JSON file of the `tokenizers` library names all 65,536 ids (arXiv 2405.09818): `IMGIMG`, the decimal digits of an
image code as letters (A = 0) and `Z`; special tokens in angle brackets, `<racm3:break>` in front of an image and
`<eoss>` behind it, `<reserved08706>` (8710) at the end of a turn; the rest is text. Everything is found by name, so a
file of another size reads as well. An asset keeps the file as its text half, and the library encodes by the file's
own rules.

That library reads special tokens out of the text it encodes, so a document could forge an image. Here it gets a copy
of the file in which text is all there is: special tokens and image codes, and merges that lead to one, are left out.
So `<s>` in a document is three characters, and a text without such a name is encoded as by the library.

Refuses files over `MAX_BYTES`, what is no byte-level BPE, names that are missing, and image codes that have gaps or
stand out of order. The only module beside the trainer that imports `tokenizers`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moma.modality import Vocabulary
from moma.schema import read_json
from moma.tokenizer.text import Coder, byte_alphabet, sound_text
from moma.tokenizer.vocab import (
    JSON_FILE,
    RANKS_FILE,
    VOCAB_FILE,
    TextOptions,
    check_vocabulary,
    save_vocabulary,
)

MAX_BYTES = 64 * 2**20
SEPARATOR = "<sep>"  # our name of `<reserved08706>`, so that documents are the same for every asset

_STRUCTURE = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "eoi": "<eoss>", "boi": "<racm3:break>"}
_END_OF_TURN = "<reserved08706>"
_IMAGE_CODE = re.compile(r"IMGIMG([A-J]{1,9})Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_MAX_ID = 2**24
_KINDS = {dict: "an object", list: "a list"}


class VocabularyFile(NamedTuple):
    """A vocabulary file by meaning: ids by name, image codes in order, and the library's state for text alone."""

    specials: dict[str, int]
    image_ids: list[int]
    text: dict[str, int]
    text_state: dict[str, Any]


def chameleon_asset(
    json_path: Path, out_folder: Path, image_grid: tuple[int, int] = (32, 32), overwrite: bool = False
) -> Vocabulary:
    """Make a tokenizer asset of a vocabulary file: `text_tokenizer.json`, a copy, and `vocab.json`.

    `image_grid` (rows, columns) of one image. Returns the asset's vocabulary, whose special token `<sep>` is
    Chameleon's end of turn. Raises ValueError for a file that is not of this kind, and for an asset in
    `out_folder` unless `overwrite`.
    """
    json_path, out_folder = Path(json_path), Path(out_folder)
    present = [name for name in (RANKS_FILE, JSON_FILE, VOCAB_FILE) if (out_folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"got {' and '.join(present)} in {out_folder} already, need an empty place: choose another folder, or "
            "pass overwrite=true (every corpus and checkpoint made with it will be refused)"
        )
    file = read_vocabulary_file(json_path)
    vocab = vocabulary_of(file, image_grid)
    specials = {SEPARATOR: file.specials[_END_OF_TURN]} if _END_OF_TURN in file.specials else {}
    check_vocabulary(vocab, specials)  # before anything is written
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / RANKS_FILE).unlink(missing_ok=True)
    if json_path.resolve() != (out_folder / JSON_FILE).resolve():
        shutil.copyfile(json_path, out_folder / JSON_FILE)
    return save_vocabulary(out_folder, vocab, TextOptions(special_tokens=specials))


def vocabulary_of(file: VocabularyFile, image_grid: tuple[int, int]) -> Vocabulary:
    """Id ranges by name, without a hash.

    Raises ValueError for a missing name and for image codes that are not 0, 1, ... at ascending ids.
    """
    missing = [name for name in _STRUCTURE.values() if name not in file.specials]
    if missing:
        raise ValueError(f"got a vocabulary file without {', '.join(missing)}, need them: take Chameleon's own")
    start = file.image_ids[0]
    for code, id_ in enumerate(file.image_ids):
        if id_ != start + code:
            raise ValueError(
                f"got image code {code} at id {id_}, need it at {start + code}, codes in order without gaps: "
                "take Chameleon's own file"
            )
    ids = [*file.specials.values(), *file.image_ids, *file.text.values()]
    return Vocabulary(
        size=max(ids) + 1,
        bos=file.specials[_STRUCTURE["bos"]],
        pad=file.specials[_STRUCTURE["pad"]],
        eos=file.specials[_STRUCTURE["eos"]],
        boi=file.specials[_STRUCTURE["boi"]],
        eoi=file.specials[_STRUCTURE["eoi"]],
        image_start=start,
        image_stop=start + len(file.image_ids),
        text_start=min(file.text.values()),
        text_stop=max(file.text.values()) + 1,
        image_grid=image_grid,
        hash="",
    )


def json_coder(path: Path, vocab: Vocabulary) -> Coder:
    """The text of a vocabulary file as ranks, id - `vocab.text_start`, and back.

    Raises ValueError if the file is not one of this kind or its ids are not those of `vocab`.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"got no package 'tokenizers', need it for {path}: pip install tokenizers") from error

    file = read_vocabulary_file(path)
    found = vocabulary_of(file, vocab.image_grid)
    for name in ("size", "image_start", "image_stop", "text_start", "text_stop", *_STRUCTURE):
        if getattr(found, name) != getattr(vocab, name):
            raise ValueError(
                f"got {name} {getattr(found, name)} by the names in {path}, need {getattr(vocab, name)} as in "
                f"{VOCAB_FILE}: put the file back that belongs to it"
            )
    try:
        tokenizer = Tokenizer.from_str(json.dumps(file.text_state))
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"got {path} that 'tokenizers' refuses ({error}), need a whole file: copy it again") from error
    start, alphabet = vocab.text_start, byte_alphabet()
    pieces = {id_ - start: _bytes_of(name, alphabet) for name, id_ in file.text.items()}

    def encode(text: str) -> list[int]:
        return [id_ - start for id_ in tokenizer.encode(sound_text(text), add_special_tokens=False).ids]

    def decode(ranks: list[int]) -> bytes:
        return b"".join(pieces.get(rank, b"") for rank in ranks)

    return Coder(encode, decode)


def read_vocabulary_file(path: Path) -> VocabularyFile:
    """Read a vocabulary file and sort its names.

    Special are the names that the file calls so, and those that begin with "<", other than "<" itself, and that no
    merge spells. Raises ValueError naming what is missing or of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"got no file {path}, need Chameleon's text_tokenizer.json or tokenizer.json: correct the path"
        )
    state = read_json(path, MAX_BYTES)
    model = _field(state, "model", dict, path)
    if model.get("type", "BPE") != "BPE" or not _cuts_bytes(state.get("pre_tokenizer")):
        raise ValueError(
            f"got {path} with model {model.get('type')!r}, need byte-level BPE (a ByteLevel pre-tokenizer): take "
            "another file"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"got {path} with marks inside or behind words, need plain byte-level BPE: take another file")
    ids = dict(_entries(_field(model, "vocab", dict, path), path))
    entries = _field(state, "added_tokens", list, path)
    added = _added_tokens(entries, ids, path)
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"got two names for one id in {path}, need one each: take another file")
    merges = [_merge(entry, number, ids, path) for number, entry in enumerate(_field(model, "merges", list, path))]
    spelled = {left + right for left, right in merges}
    codes = {name: int(found[1].translate(_DIGITS)) for name in ids if (found := _IMAGE_CODE.fullmatch(name))}
    if not codes or sorted(codes.values()) != list(range(len(codes))):
        raise ValueError(
            f"got {len(codes)} names of image codes in {path}, need 0, 1, ... each once: take another file"
        )
    others = {name: id_ for name, id_ in ids.items() if name not in codes}
    specials = {name: id_ for name, id_ in others.items() if _is_special(name, added, spelled)}
    text = {name: id_ for name, id_ in others.items() if name not in specials}
    missing = [byte for character, byte in byte_alphabet().items() if character not in text]
    if missing:
        raise ValueError(f"got {path} without the single bytes {missing[:8]}, need all 256: take another file")
    text_state = {
        **state,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": [entry for entry in entries if entry["content"] in text],
        "model": {
            **model,
            "dropout": None,  # of merges, a trick of training
            "unk_token": None,
            "vocab": text,
            "merges": [[left, right] for left, right in merges if {left, right, left + right} <= text.keys()],
        },
    }
    image_ids = [ids[name] for name in sorted(codes, key=codes.__getitem__)]
    return VocabularyFile(specials, image_ids, text, text_state)


def _is_special(name: str, added: dict[str, bool], spelled: set[str]) -> bool:
    bracket = name.startswith("<") and name != "<"
    return name in _STRUCTURE.values() or added.get(name, False) or (bracket and (name in added or name not in spelled))


def _field(mapping: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    value = mapping.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"got {name!r} of {path} as {type(value).__name__}, need {_KINDS[kind]}: take another file")
    return value


def _entries(vocab: dict[str, Any], path: Path) -> Iterator[tuple[str, int]]:
    for name, id_ in vocab.items():
        if type(id_) is not int or not 0 <= id_ < _MAX_ID:
            raise ValueError(f"got id {id_!r:.40} for {name!r:.40} in {path}, need a whole number: take another file")
        yield name, id_


def _added_tokens(entries: list[Any], ids: dict[str, int], path: Path) -> dict[str, bool]:
    """Whether each added token is special; those that the model does not know are put into `ids`."""
    added = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(
                f"got added token {entry!r:.60} in {path}, need an object with 'content': take another file"
            )
        name = entry["content"]
        for known, id_ in _entries({name: entry.get("id")}, path):
            if ids.setdefault(known, id_) != id_:
                raise ValueError(f"got ids {ids[name]} and {id_} for {name!r} in {path}, need one: take another file")
        added[name] = bool(entry.get("special"))
    return added


def _merge(entry: Any, number: int, ids: dict[str, int], path: Path) -> tuple[str, str]:
    """A merge, "a b" or ["a", "b"], of names that the file knows."""
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"got merge {number} of {path} as {entry!r:.60}, need two names: take another file")
    for name in (*parts, "".join(parts)):
        if name not in ids:
            raise ValueError(
                f"got merge {number} of {path} with the unknown {name!r:.40}, need known names: take another file"
            )
    return parts[0], parts[1]


def _cuts_bytes(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer, or one in its sequence, spells text in the byte alphabet."""
    if not isinstance(pre_tokenizer, dict):
        return False
    steps = pre_tokenizer.get("pretokenizers")
    return pre_tokenizer.get("type") == "ByteLevel" or (isinstance(steps, list) and any(map(_cuts_bytes, steps)))


def _bytes_of(name: str, alphabet: dict[str, int]) -> bytes:
    """The bytes that a text token spells; a name outside of the byte alphabet stands for itself."""
    if all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)
    return name.encode()
