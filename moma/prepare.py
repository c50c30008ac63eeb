"""`moma prepare`: raw documents -> token shards.

    sources --split by key--> chunks --workers: open, encode pictures, encode text--> shards --> manifest
    (last)

A chunk is a fixed run of a source's documents of about `shard_tokens` tokens and becomes one shard, so the
result depends on the config alone, not on the number of workers or on interruptions. A finished shard leaves
a record in `.progress/`; a stopped preparation, started again with the same config, makes the missing shards
only. The manifest is written last: no training run can read half a corpus.

Refuses to continue a corpus of another config or tokenizer (`overwrite=true` starts it afresh). A broken
picture takes its document with it: skipped, counted and listed in the manifest, or an error with
`on_error=stop`.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from moma.checkpoint import LOCK, alone
from moma.config import Composed
from moma.data.shards import (
    MANIFEST,
    read_manifest,
    source_record,
    token_dtype,
    write_json,
    write_manifest,
    write_shard,
)
from moma.data.sources import (
    RawDocument,
    SourceConfig,
    attribution_text,
    source_of,
    sources_field,
    split_of,
)
from moma.modality import Vocabulary
from moma.schema import plain
from moma.tokenizer.documents import Document, Part, Picture, Text, encode_document
from moma.tokenizer.image import ImageTokenizer, open_image
from moma.tokenizer.text import TextTokenizer
from moma.tokenizer.vocab import IMAGE_FILES, asset_folder, load_vocabulary

ATTRIBUTION = "ATTRIBUTION"
PROGRESS = ".progress"
_BYTES_PER_TOKEN = 4  # of English text: only sets where chunks end
_PICTURES_AT_ONCE = 256  # opened pictures held by a worker


@dataclass(frozen=True)
class PrepareConfig:
    """`sources`: name -> {kind, options}; the corpus is `corpora`/`name`; `tokenizer` a name or a folder.

    `name` null: as the chosen data option. `folder` of the raw data is there for the options' interpolations.
    `val_fraction` of split keys are held out by `salt`; a shard has about `shard_tokens` tokens; `workers`
    processes (0: one per core); `device` of the image tokenizer; `on_error` skip or stop at a broken picture.
    """

    name: str | None = None
    corpora: str = "corpora"
    tokenizer: str = "small"
    folder: str | None = None
    sources: dict[str, SourceConfig] = sources_field()
    val_fraction: float = 0.05
    salt: str = "moma-split-1"
    shard_tokens: int = 65536
    workers: int = 0
    device: str = "cpu"
    on_error: Literal["skip", "stop"] = "skip"
    overwrite: bool = False


class Chunk(NamedTuple):
    """Documents that become one shard: the `number`-th of its source and split."""

    split: str
    source: str
    number: int
    documents: list[RawDocument]

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.source}-{self.number:05d}"


class Encoders(NamedTuple):
    """What turns raw documents into tokens; `image` is None in an asset without an image tokenizer."""

    text: TextTokenizer
    image: ImageTokenizer | None
    vocab: Vocabulary


def main(composed: Composed) -> int:
    """`moma prepare`: makes the corpus, named after the data option unless it has a name; returns 0."""
    config: PrepareConfig = composed.config
    prepare(config if config.name else replace(config, name=composed.choices["data"]))
    return 0


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make, continue or (if it is finished) reopen the corpus, and return its manifest.

    Workers are spawned: a script that calls this with more than one worker guards its main part as usual.
    Raises ValueError for a config, tokenizer or source that does not fit, and for a broken picture with
    `on_error=stop`.
    """
    _check(config)
    asset = asset_folder(config.tokenizer)
    vocab = load_vocabulary(asset)
    corpus = Path(config.corpora) / str(config.name)
    provenance = _provenance(config, vocab)
    with alone(corpus):
        if _begin(corpus, provenance, config.overwrite):
            return read_manifest(corpus)
        records = _shards(config, asset, vocab, corpus)
        manifest = _manifest(config, vocab, provenance, records)
        title = "The token shards in this folder were made from:"
        (corpus / ATTRIBUTION).write_text(attribution_text(title, manifest["attribution"]))
        write_manifest(corpus, manifest)
        shutil.rmtree(corpus / PROGRESS)
    return read_manifest(corpus)


def encode_chunk(chunk: Chunk, encoders: Encoders, on_error: str) -> tuple[list[Document], dict[str, int], list[str]]:
    """Encode a chunk's documents in order: documents, number skipped by reason, and "place: reason" of each.

    Pictures of many documents go through the image tokenizer together; those that are codes already are kept.
    """
    encoded: list[Document] = []
    skipped: Counter[str] = Counter()
    places: list[str] = []
    for batch in _picture_batches(chunk.documents):
        opened: list[RawDocument] = []
        images: list[Image.Image] = []
        for document in batch:
            if not any(isinstance(part, Picture) or part.text for part in _parts(document)):
                skipped["empty"] += 1
                places.append(f"{document.id}: no text and no picture")
                continue
            try:
                images.extend(_open_pictures(document))
            except (ValueError, OSError) as error:
                if on_error == "stop":
                    raise ValueError(
                        f"got a broken picture in document {document.id} ({error}), need readable ones: "
                        "mend or remove it, or pass on_error=skip"
                    ) from error
                skipped["broken_picture"] += 1
                places.append(f"{document.id}: {error}")
                continue
            opened.append(document)
        codes = iter(_encode_pictures(images, encoders, chunk.source))
        for document in opened:
            segments = [
                [
                    Picture(next(codes), part.place) if isinstance(part, Picture) and _is_raw(part) else part
                    for part in segment
                ]
                for segment in document.segments
            ]
            encoded.append(encode_document(segments, encoders.text, encoders.vocab))
    return encoded, dict(skipped), places


def _check(config: PrepareConfig) -> None:
    if not config.sources:
        raise ValueError("got no sources, need at least one: name them, as in conf/raw/data")
    for what, name in [("corpus", config.name), *(("source", name) for name in config.sources)]:
        # A hidden one would meet our own .lock and .progress, and `..` would lead out of the folder.
        if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
            raise ValueError(
                f"got {what} name {name!r}, need a plain folder name (no / or \\, no dot in front): rename it"
            )
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"got val_fraction={config.val_fraction}, need 0 to below 1: use 0.05")
    if config.shard_tokens < 1 or config.workers < 0:
        raise ValueError(
            f"got shard_tokens={config.shard_tokens} and workers={config.workers}, need at least 1 and 0: "
            "use 65536 and 0"
        )


def _provenance(config: PrepareConfig, vocab: Vocabulary) -> list[dict[str, Any]]:
    """All that decides the bytes of the corpus: equal provenance, equal shards."""
    common = {
        "vocab_hash": vocab.hash,
        "val_fraction": config.val_fraction,
        "salt": config.salt,
        "shard_tokens": config.shard_tokens,
        "on_error": config.on_error,
    }
    entries = []
    for name, options in plain(config)["sources"].items():
        source = config.sources[name]
        versions = [credit["version"] for credit in source_of(source).attribution(source)]
        entries.append({"source": name, "options": options, "versions": versions, **common})
    return entries


def _begin(corpus: Path, provenance: list[dict[str, Any]], overwrite: bool) -> bool:
    """Open the corpus's folder; whether the corpus is finished already."""
    recorded = corpus / PROGRESS / "provenance.json"
    if overwrite and corpus.exists():
        others = any(path.name not in (LOCK, PROGRESS) for path in corpus.iterdir())
        if not recorded.is_file() and not (corpus / MANIFEST).is_file() and others:
            raise ValueError(
                f"got folder {corpus} with files that are no corpus, need a corpus or an empty folder: "
                "choose another name"
            )
        _clear(corpus, recorded)
        write_json(recorded, provenance)
        return False
    if (corpus / MANIFEST).is_file():
        found, finished = read_manifest(corpus)["provenance"], True
    elif recorded.is_file():
        found, finished = json.loads(recorded.read_text()), False
        for temporary in corpus.rglob(".*.tmp*"):  # of killed workers
            temporary.unlink(missing_ok=True)
    else:
        recorded.parent.mkdir(parents=True, exist_ok=True)
        write_json(recorded, provenance)
        return False
    if found != provenance:
        raise ValueError(
            f"got corpus {corpus} of another config, tokenizer or package version "
            f"({_first_difference(found, provenance)}), "
            "need the same to continue it: choose another name, or pass overwrite=true"
        )
    return finished


def _clear(corpus: Path, recorded: Path) -> None:
    """Remove all of a corpus but its lock and `recorded`, the manifest before any shard.

    A kill in the middle leaves no manifest without its shards, and a folder that only overwrite=true takes.
    """
    recorded.parent.mkdir(exist_ok=True)
    write_json(recorded, [])  # of no config: refused by all but the next overwrite
    (corpus / MANIFEST).unlink(missing_ok=True)
    for path in [*recorded.parent.iterdir(), *corpus.iterdir()]:
        if path in (recorded, recorded.parent, corpus / LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _first_difference(found: list[dict[str, Any]], need: list[dict[str, Any]]) -> str:
    if [entry["source"] for entry in found] != [entry["source"] for entry in need]:
        return f"sources {[entry['source'] for entry in found]}, now {[entry['source'] for entry in need]}"
    for old, new in zip(found, need, strict=True):
        for key in new:
            if old.get(key) != new[key]:
                return f"{key} of {new['source']} was {old.get(key)!r}, now {new[key]!r}"
    return "an entry that this version does not know"


def _shards(
    config: PrepareConfig, asset: Path, vocab: Vocabulary, corpus: Path
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of every shard by split and source; makes the shards whose record is missing."""
    workers = config.workers or len(os.sched_getaffinity(0))
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    report = _Progress()

    def keep(record: dict[str, Any]) -> None:
        records.setdefault((record["split"], record["source"]), []).append(record)
        report.add(record)

    if workers == 1:
        _start_worker(asset, vocab, config.device)
        for chunk in _chunks(config, vocab):
            keep(_finished(corpus, chunk) or _make_shard(chunk, corpus, config.on_error))
    else:
        # Spawned, not forked: forking a process that has used torch's threads can hang.
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_pool_worker, initargs=(asset, vocab, config.device)
        )
        waiting: set[Future[dict[str, Any]]] = set()
        try:
            for chunk in _chunks(config, vocab):
                if done := _finished(corpus, chunk):
                    keep(done)
                    continue
                waiting.add(pool.submit(_make_shard, chunk, corpus, config.on_error))
                if len(waiting) >= 2 * workers:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        keep(future.result())
            for future in waiting:
                keep(future.result())
        except BrokenProcessPool as error:
            raise ValueError(
                f"got a worker process that was killed (out of memory?), need all {workers} alive: start the "
                "same command again with fewer workers; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    report.end()
    return {key: sorted(shards, key=lambda record: record["number"]) for key, shards in records.items()}


def _chunks(config: PrepareConfig, vocab: Vocabulary) -> Iterator[Chunk]:
    """Documents in order of source, cut into chunks by an estimate of their tokens."""
    for name, source in config.sources.items():
        held: dict[str, list[RawDocument]] = {"train": [], "val": []}
        size, number = Counter(), Counter()
        for document in source_of(source).documents(source):
            split = split_of(document, config.val_fraction, config.salt)
            held[split].append(document)
            size[split] += _estimate(document, vocab)
            if size[split] >= config.shard_tokens:
                yield Chunk(split, name, number[split], held[split])
                held[split], size[split] = [], 0
                number[split] += 1
        for split, documents in held.items():
            if documents:
                yield Chunk(split, name, number[split], documents)


def _estimate(document: RawDocument, vocab: Vocabulary) -> int:
    parts = _parts(document)
    text = sum(len(part.text) for part in parts if isinstance(part, Text))
    pictures = sum(isinstance(part, Picture) for part in parts)
    return 2 + text // _BYTES_PER_TOKEN + pictures * (vocab.tokens_per_image + 2)


def _finished(corpus: Path, chunk: Chunk) -> dict[str, Any] | None:
    """The record of a shard that is there already; None if it is missing or its tokens are not whole."""
    path = corpus / PROGRESS / f"{chunk.stem}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    tokens = corpus / chunk.split / chunk.source / record["shard"]["file"]
    size = tokens.stat().st_size if tokens.is_file() else 0
    return record if size == record["shard"]["bytes"] else None


# The tokenizers of this process: loaded once, used for every chunk that it gets.
_ENCODERS: list[Encoders] = []


def _start_pool_worker(asset: Path, vocab: Vocabulary, device: str) -> None:
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _start_worker(asset, vocab, device)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(asset: Path, vocab: Vocabulary, device: str) -> None:
    # One thread: workers share the cores, and codes must not depend on how many threads summed.
    torch.set_num_threads(1)
    _ENCODERS[:] = [load_encoders(asset, vocab, device)]


def load_encoders(asset: Path, vocab: Vocabulary, device: str) -> Encoders:
    """Text and image tokenizer of an asset folder; ValueError if codes and vocabulary do not fit."""
    text = TextTokenizer.load(asset, vocab)
    if not any((asset / name).is_file() for name in IMAGE_FILES):
        return Encoders(text, None, vocab)
    image = ImageTokenizer.load(asset, device)
    n_codes = vocab.image_stop - vocab.image_start
    if (image.n_codes, tuple(image.grid)) != (n_codes, tuple(vocab.image_grid)):
        raise ValueError(
            f"got an image tokenizer of {image.n_codes} codes on a grid of {tuple(image.grid)}, need "
            f"{n_codes} on {tuple(vocab.image_grid)} as in {asset}/vocab.json: "
            "train the two halves with the same sizes"
        )
    return Encoders(text, image, vocab)


def _make_shard(chunk: Chunk, corpus: Path, on_error: str) -> dict[str, Any]:
    """Encode and write one shard, then its record: a shard without a record is made again."""
    (encoders,) = _ENCODERS
    documents, skipped, places = encode_chunk(chunk, encoders, on_error)
    folder = corpus / chunk.split / chunk.source
    shard = write_shard(folder, chunk.number, documents, token_dtype(encoders.vocab.size))
    record = {
        "split": chunk.split,
        "source": chunk.source,
        "number": chunk.number,
        "shard": shard,
        "skipped": skipped,
        "places": places,
    }
    write_json(corpus / PROGRESS / f"{chunk.stem}.json", record)
    return record


def _picture_batches(documents: list[RawDocument]) -> Iterator[list[RawDocument]]:
    """Runs of documents with some `_PICTURES_AT_ONCE` pictures together."""
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += sum(isinstance(part, Picture) for part in _parts(document))
        if held >= _PICTURES_AT_ONCE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _parts(document: RawDocument) -> list[Part]:
    return [part for segment in document.segments for part in segment]


def _is_raw(picture: Picture) -> bool:
    return not isinstance(picture.content, np.ndarray)


def _open_pictures(document: RawDocument) -> list[Image.Image]:
    pictures = [part for part in _parts(document) if isinstance(part, Picture) and _is_raw(part)]
    return [
        picture.content
        if isinstance(picture.content, Image.Image)
        else open_image(cast(Callable[[], bytes], picture.content)(), picture.place)
        for picture in pictures
    ]


def _encode_pictures(images: list[Image.Image], encoders: Encoders, source: str) -> Sequence[np.ndarray]:
    if not images:
        return []
    if encoders.image is None:
        raise ValueError(
            f"got pictures in source {source!r} but no image tokenizer, need {' and '.join(IMAGE_FILES)} in "
            "the tokenizer's folder: run `moma train_vq`, or leave sources with pictures out"
        )
    return list(encoders.image.encode(images))


def _manifest(
    config: PrepareConfig,
    vocab: Vocabulary,
    provenance: list[dict[str, Any]],
    records: dict[tuple[str, str], list[dict[str, Any]]],
) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    skipped: Counter[str] = Counter()
    attribution, places = [], []
    for name, config_ in config.sources.items():
        source = source_of(config_)
        attribution += [{"source": name, **credit} for credit in source.attribution(config_)]
        for split, entries in splits.items():
            made = records.get((split, name), [])
            for record in made:
                skipped.update(record["skipped"])
                places += record["places"]
            entry = source_record(source.kind, [record["shard"] for record in made])
            if entry["documents"]:
                entries[name] = entry
    return {
        "name": config.name,
        "vocab_hash": vocab.hash,
        "tokenizer": config.tokenizer,
        "token_dtype": token_dtype(vocab.size),
        "splits": splits,
        "provenance": provenance,
        "attribution": attribution,
        "skipped": dict(skipped),
        "skipped_places": places,
    }


class _Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.start = self.last = time.monotonic()

    def add(self, record: dict[str, Any]) -> None:
        shard = record["shard"]
        self.count.update(shards=1, documents=shard["documents"], images=shard["images"], tokens=shard["tokens"])
        self.count["skipped"] += sum(record["skipped"].values())
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if terminal or now - self.last >= 10:
            self._print(end="" if terminal else "\n")
            self.last = now

    def end(self) -> None:
        self._print(end="\n")

    def _print(self, end: str) -> None:
        count = ", ".join(f"{number:,} {what}" for what, number in self.count.items())
        start = "\r" if sys.stderr.isatty() else ""
        line = f"{start}prepare: {count}, {time.monotonic() - self.start:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)
