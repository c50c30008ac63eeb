"""Token shards: the corpus on disk, written once and read piece by piece.

    corpora/<name>/manifest.json                             written last: a corpus without it is not done
    corpora/<name>/<split>/<source>/shard-00000.tokens.bin   ids of all documents, uint16 or uint32 (LE)
                                    shard-00000.index.npz    doc_offset, segment_offset, segment_images
                                    shard-00000.mask.bin     optional: uint8 a token, 0 = never a target

    doc_offset      0 .............. 68 .............. 137 ...   (documents + 1)
    segment_offset  0 .............. 68 ..... 90 ..... 137 ...   (segments + 1), holds every doc_offset

Opening a corpus reads the index only: the plan is computed from document lengths, tokens are touched when a
batch needs them. Segments tile the documents; a segment with pictures is never cut by the plan.

Tokens are read by `pread`, not by memory map: where a file is cut short or its disk fails during a run, a map ends the
process with a bus error and without a word, a read says what happened to which file.

Refuses shards whose size differs from the manifest or that cannot be read, an index that does not fit its tokens,
and a corpus made with another tokenizer.
"""

import difflib
import hashlib
import io
import json
import os
import uuid
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from moma.tokenizer.documents import Document

FORMAT = 1
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> str:
    """`uint16` where every id fits, else `uint32`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(folder: Path, number: int, documents: Sequence[Document], dtype: str) -> dict[str, Any]:
    """Write one shard and return its manifest record; a shard of no documents has a record but no files.

    Record: file (tokens), tokens, documents, images, sha256 and bytes of the token file, index_sha256, mask.
    """
    folder = Path(folder)
    stem = f"shard-{number:05d}"
    record: dict[str, Any] = {
        "file": f"{stem}.tokens.bin",
        "tokens": 0,
        "documents": len(documents),
        "images": 0,
    }
    if not documents:
        return record | {"sha256": "", "bytes": 0, "index_sha256": "", "mask": False}
    tokens = np.concatenate([document.tokens for document in documents])
    if tokens.min() < 0 or tokens.max() > np.iinfo(dtype).max:
        raise ValueError(
            f"got token ids from {tokens.min()} to {tokens.max()}, need ids that fit {dtype}: "
            "use token_dtype(vocab.size)"
        )
    starts = np.cumsum([0, *(len(document.tokens) for document in documents)], dtype=np.int64)
    segments = [start + document.segment_offsets[:-1] for start, document in zip(starts, documents, strict=False)]
    images = np.concatenate([document.segment_images for document in documents]).astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    packed = tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    write_bytes(folder / record["file"], packed)
    index = folder / f"{stem}.index.npz"
    buffer = io.BytesIO()
    np.savez(
        buffer,
        doc_offset=starts,
        segment_offset=np.concatenate([*segments, starts[-1:]]).astype(np.int64),
        segment_images=images,
    )
    write_bytes(index, buffer.getvalue())
    masked = any(document.mask is not None for document in documents)
    if masked:
        masks = [np.ones(len(d.tokens), np.uint8) if d.mask is None else d.mask for d in documents]
        write_bytes(folder / f"{stem}.mask.bin", np.concatenate(masks).astype(np.uint8).tobytes())
    return record | {
        "tokens": len(tokens),
        "images": int(images.sum()),
        "sha256": hashlib.sha256(packed).hexdigest(),
        "bytes": len(packed),
        "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "mask": masked,
    }


def write_shards(folder: Path, documents: Iterable[Document], shard_tokens: int, dtype: str) -> list[dict[str, Any]]:
    """Write documents in order, closing a shard once it holds `shard_tokens`; the records of all shards."""
    records: list[dict[str, Any]] = []
    shard: list[Document] = []
    held = 0
    for document in documents:
        shard.append(document)
        held += len(document.tokens)
        if held >= shard_tokens:
            records.append(write_shard(folder, len(records), shard, dtype))
            shard, held = [], 0
    if shard:
        records.append(write_shard(folder, len(records), shard, dtype))
    return records


def source_record(kind: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest entry of one source in one split: kind, its non-empty shards, and their totals."""
    shards = [shard for shard in shards if shard["documents"]]
    totals = {field: sum(shard[field] for shard in shards) for field in ("tokens", "documents", "images")}
    return {"kind": kind, "shards": shards, **totals}


def write_manifest(corpus: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`: a corpus has a whole one or none."""
    write_json(Path(corpus) / MANIFEST, {"format": FORMAT, **manifest})


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    # A name of its own on every machine that may be writing the same file to a shared folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, fsync, rename: the file is whole or not there."""
    write_bytes(Path(path), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus; ValueError if there is none or it has another format."""
    path = Path(corpus) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"got no {MANIFEST} in {corpus}, need a prepared corpus: run `moma prepare` "
            "(again, if it was stopped: finished shards are kept)"
        )
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"got corpus format {manifest.get('format')} in {path}, need {FORMAT}: prepare the corpus again"
        )
    return manifest


class ShardedSource:
    """The documents of one source in one split; they are numbered across shards.

    `document_tokens` int64 (n,) lengths in tokens, `document_images` int32 (n,) pictures. Survives pickling:
    files are opened where they are used. Reading raises ValueError for a file that is gone, cut short or unreadable.
    """

    def __init__(self, folder: Path, kind: str, shards: list[dict[str, Any]], dtype: str) -> None:
        self.folder, self.kind, self.dtype = Path(folder), kind, np.dtype(dtype).newbyteorder("<")
        self._shards = shards
        indices = [_read_index(self.folder, shard, self.dtype.itemsize) for shard in shards]
        counts = [shard["documents"] for shard in shards]
        self._first_document = [0, *accumulate(counts)]
        self.n_documents = self._first_document[-1]
        self._doc_offset = [doc for doc, _, _ in indices]
        self._segment_offset = [segment for _, segment, _ in indices]
        self._segment_images = [images for _, _, images in indices]
        # Segment number at which each document of a shard starts (and one past its last).
        self._doc_segment = [np.searchsorted(segment, doc) for doc, segment, _ in indices]
        self.document_tokens = np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._doc_offset)])
        self.document_images = np.concatenate(
            [np.zeros(0, np.int32)]
            + [
                np.diff(np.concatenate([[0], np.cumsum(images)])[bounds]).astype(np.int32)
                for images, bounds in zip(self._segment_images, self._doc_segment, strict=True)
            ]
        )
        self._files: dict[str, io.FileIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def segments(self, doc: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets int64 (k+1,) from the document's start, and pictures int32 (k,), of its k segments."""
        shard, local = self._locate(doc)
        first, last = self._doc_segment[shard][local : local + 2]
        offsets = self._segment_offset[shard][first : last + 1] - self._doc_offset[shard][local]
        return offsets, self._segment_images[shard][first:last]

    def read(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) of a document, of the stored dtype; read-only."""
        shard, offset = self._span(doc, start, stop)
        return self._numbers(self._shards[shard]["file"], self.dtype, offset, stop - start)

    def read_mask(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Loss mask uint8 (stop - start,) of a document's tokens; ones where the shard has no mask."""
        shard, offset = self._span(doc, start, stop)
        record = self._shards[shard]
        if not record["mask"]:
            return np.ones(stop - start, np.uint8)
        return self._numbers(_sibling(record["file"], "mask.bin"), np.dtype(np.uint8), offset, stop - start)

    def _locate(self, doc: int) -> tuple[int, int]:
        if not 0 <= doc < self.n_documents:
            raise IndexError(f"got document {doc}, need 0 to {self.n_documents - 1}")
        shard = bisect_right(self._first_document, doc) - 1
        return shard, doc - self._first_document[shard]

    def _span(self, doc: int, start: int, stop: int) -> tuple[int, int]:
        shard, local = self._locate(doc)
        begin, end = self._doc_offset[shard][local : local + 2]
        if not 0 <= start <= stop <= end - begin:
            raise IndexError(f"got tokens [{start}, {stop}) of document {doc}, need a range in [0, {end - begin}]")
        return shard, int(begin) + start

    def _numbers(self, file: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        size = count * dtype.itemsize
        try:
            if file not in self._files:
                self._files[file] = io.FileIO(self.folder / file)
            content = os.pread(self._files[file].fileno(), size, offset * dtype.itemsize)
        except OSError as error:
            raise _unreadable(self.folder / file, str(error.strerror)) from error
        if len(content) != size:
            raise ValueError(
                f"got {len(content)} of {size} bytes at {offset * dtype.itemsize} in {self.folder / file}, need the "
                "file as it was when the corpus was opened (it has been cut short since): copy it again"
            )
        return np.frombuffer(content, dtype)


def open_source(corpus: Path, split: str, source: str) -> ShardedSource:
    """Open one source of one split; ValueError for an unknown name or a damaged shard."""
    manifest = read_manifest(corpus)
    sources = _split(manifest, split, corpus)
    if source not in sources:
        near = difflib.get_close_matches(source, sources, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {sorted(sources)}"
        raise ValueError(f"got source {source!r}, need a source of {corpus} {split}: {hint}")
    entry = sources[source]
    return ShardedSource(Path(corpus) / split / source, entry["kind"], entry["shards"], manifest["token_dtype"])


def open_corpus(corpus: Path, split: str, vocab_hash: str) -> dict[str, ShardedSource]:
    """Every source of one split, in the manifest's order; ValueError if another tokenizer made the corpus."""
    manifest = read_manifest(corpus)
    if manifest["vocab_hash"] != vocab_hash:
        raise ValueError(
            f"got {corpus} of tokenizer {manifest['tokenizer']!r} with hash {manifest['vocab_hash']}, "
            f"need the run's tokenizer with hash {vocab_hash}: prepare it again, or choose its tokenizer"
        )
    return {source: open_source(corpus, split, source) for source in _split(manifest, split, corpus)}


def _split(manifest: dict[str, Any], split: str, corpus: Path) -> dict[str, Any]:
    if split not in manifest["splits"]:
        raise ValueError(f"got split {split!r}, need one of {sorted(manifest['splits'])} of {corpus}: choose one")
    return manifest["splits"][split]


def _read_index(folder: Path, shard: dict[str, Any], itemsize: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = folder / shard["file"]
    expected = {tokens: shard["tokens"] * itemsize}
    if shard["mask"]:
        expected[folder / _sibling(shard["file"], "mask.bin")] = shard["tokens"]
    for path, size in expected.items():
        _need_file(path)
        if path.stat().st_size != size:
            raise ValueError(
                f"got {path.stat().st_size} bytes in {path}, need {size} as in the manifest (the shard is "
                "cut short or overwritten): copy it again, or delete the corpus and prepare it again"
            )
    path = folder / _sibling(shard["file"], "index.npz")
    _need_file(path)
    try:
        with np.load(path, allow_pickle=False) as index:
            doc, segment, images = index["doc_offset"], index["segment_offset"], index["segment_images"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, str(error)) from error
    fits = (
        len(doc) == shard["documents"] + 1
        and len(segment) == len(images) + 1
        and (doc[0], doc[-1], segment[0], segment[-1]) == (0, shard["tokens"], 0, shard["tokens"])
        and bool((np.diff(doc) > 0).all() and (np.diff(segment) > 0).all())
        and bool((segment[np.searchsorted(segment, doc)] == doc).all())
    )
    if not fits:
        raise ValueError(
            f"got an index {path} that does not tile its {shard['documents']} documents, need the one that "
            "was written with the shard: copy it again, or delete the corpus and prepare it again"
        )
    return doc, segment, images


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"got no file {path}, need every shard of the manifest: copy it, or prepare again")
    if not os.access(path, os.R_OK):
        raise _unreadable(path, "Permission denied")


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"got {path} that cannot be read ({reason}), need every shard of the corpus: check its disk and its "
        "permissions, copy it again, or prepare again"
    )


def _sibling(file: str, ending: str) -> str:
    return file.removesuffix("tokens.bin") + ending


def corpus_hash(corpus: Path, split: str) -> str:
    """Identity of one split's tokens and document boundaries: hash over its shards' hashes, hex."""
    sources = _split(read_manifest(corpus), split, corpus)
    shards = {
        name: [(s["sha256"], s["index_sha256"]) for s in entry["shards"]] for name, entry in sorted(sources.items())
    }
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
