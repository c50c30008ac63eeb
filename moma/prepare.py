"""`moma prepare`: raw documents -> token shards.

    sources --split by key--> chunks --workers: open, encode pictures, encode text--> shards --> manifest
    (last)

A chunk is a fixed run of a source's documents of about `shard_tokens` tokens and becomes one shard
(`moma/data/chunks.py`, `encoding.py`, `workers.py`), so the result depends on the config alone, not on the number
of workers, the engine or interruptions. A finished shard leaves a record in `.progress/`; a stopped preparation,
started again with the same config, makes the missing shards only. The manifest is written last: no training run
can read half a corpus.

    near_duplicates=keep    one pass over all chunks
    near_duplicates=drop    held-out chunks first; training chunks are then compared with all of them

What cannot be read is skipped, counted in the manifest and listed with place and reason in `skipped.jsonl`, or an
error with `on_error=stop`. Refuses to continue a corpus of another config, tokenizer or input (`overwrite=true`
starts it afresh).
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from moma.checkpoint import LOCK, alone
from moma.config import Composed
from moma.data.chunks import Chunk, Cut, Survey, cut, survey
from moma.data.encoding import AugmentConfig
from moma.data.near_duplicates import joined, packed, unpacked
from moma.data.ray_workers import in_ray, ray_session
from moma.data.shards import (
    MANIFEST,
    read_manifest,
    source_record,
    token_dtype,
    write_bytes,
    write_json,
    write_manifest,
)
from moma.data.sources import SourceConfig, attribution_text, source_of, sources_field
from moma.data.workers import PROGRESS, Setup, in_processes
from moma.log import Progress
from moma.modality import Vocabulary
from moma.schema import plain
from moma.tokenizer.vocab import asset_folder, load_vocabulary

ATTRIBUTION = "ATTRIBUTION"
SKIPPED = "skipped.jsonl"
_LIBRARIES = ("torch", "pillow", "tiktoken", "numpy")  # whose versions may change a bit of the result


@dataclass(frozen=True)
class PrepareConfig:
    """`sources`: name -> {kind, options}; the corpus is `corpora`/`name`; `tokenizer` a name or a folder.

    `name` null: as the chosen data option. `folder` of the raw data is there for the options' interpolations.
    `val_fraction` of split keys are held out by `salt`; a shard has about `shard_tokens` tokens; `on_error` skip
    or stop at what cannot be read.

    `augment`: more views of training pictures. `near_duplicates` drop: training documents that show a picture
    within `near_bits` of 64 bits of a held-out one, and texts that share `near_overlap` of their runs of words with
    one, are skipped.

    `engine` processes of this machine, or ray; `workers` 0: one per core, or per GPU with `device` cuda;
    `ray_address` of a cluster, null: a Ray of this machine alone.
    """

    name: str | None = None
    corpora: str = "corpora"
    tokenizer: str = "small"
    folder: str | None = None
    sources: dict[str, SourceConfig] = sources_field()
    val_fraction: float = 0.05
    salt: str = "moma-split-1"
    shard_tokens: int = 65536
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    near_duplicates: Literal["keep", "drop"] = "keep"
    near_bits: int = 4
    near_overlap: float = 0.8
    engine: Literal["processes", "ray"] = "processes"
    workers: int = 0
    ray_address: str | None = None
    device: str = "cpu"
    on_error: Literal["skip", "stop"] = "skip"
    overwrite: bool = False


def main(composed: Composed) -> int:
    """`moma prepare`: makes the corpus, named after the data option unless it has a name; returns 0."""
    config: PrepareConfig = composed.config
    prepare(config if config.name else replace(config, name=composed.choices["data"]))
    return 0


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make, continue or (if it is finished) reopen the corpus, and return its manifest.

    Workers are spawned: a script that calls this with more than one worker guards its main part as usual.
    Raises ValueError for a config, tokenizer or source that does not fit, for an input that changed since the
    start, and for what cannot be read with `on_error=stop`.
    """
    _check(config)
    asset = asset_folder(config.tokenizer).resolve()
    vocab = load_vocabulary(asset)
    corpus = Path(config.corpora).resolve() / str(config.name)
    provenance = _provenance(config, vocab)
    with alone(corpus):
        if not _begin(corpus, provenance, config.overwrite):
            rule = Cut(
                config.val_fraction, config.salt, config.shard_tokens, vocab.tokens_per_image, config.augment.views
            )
            found = _survey(config, rule, corpus)
            _make_shards(config, rule, found, asset, vocab, corpus)
            manifest = _manifest(config, vocab, provenance, found, corpus)
            title = "The token shards in this folder were made from:"
            (corpus / ATTRIBUTION).write_text(attribution_text(title, manifest["attribution"]))
            write_manifest(corpus, manifest)
            _summary(manifest, corpus)
        shutil.rmtree(corpus / PROGRESS, ignore_errors=True)
    return read_manifest(corpus)


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
    if not (0 <= config.near_bits <= 16 and 0.5 <= config.near_overlap <= 1):
        raise ValueError(
            f"got near_bits={config.near_bits} and near_overlap={config.near_overlap}, need 0 to 16 and 0.5 to 1: "
            "use 4 and 0.8"
        )
    if config.ray_address and config.engine != "ray":
        raise ValueError(f"got ray_address={config.ray_address} for engine={config.engine}, need ray: set engine=ray")
    if config.device.startswith("cuda") and config.engine == "processes" and not torch.cuda.is_available():
        raise ValueError(f"got device={config.device} on a machine without a usable GPU, need one: use device=cpu")


def _provenance(config: PrepareConfig, vocab: Vocabulary) -> list[dict[str, Any]]:
    """All that decides the bytes of the corpus: equal provenance, equal shards."""
    common: dict[str, Any] = {
        "vocab_hash": vocab.hash,
        "val_fraction": config.val_fraction,
        "salt": config.salt,
        "shard_tokens": config.shard_tokens,
        "on_error": config.on_error,
    }
    # Named only where they are not the plain way, so that corpora from before they existed are known again.
    if config.augment.views > 1:
        common["augment"] = plain(config.augment)
    if config.near_duplicates == "drop":
        common["near_duplicates"] = {"bits": config.near_bits, "overlap": config.near_overlap}
    if config.device != "cpu":
        common["device"] = config.device.split(":")[0]
    entries = []
    for name, options in plain(config)["sources"].items():
        source = config.sources[name]
        versions = [credit["version"] for credit in source_of(source).attribution(source)]
        entries.append({"source": name, "options": options, "versions": versions, **common})
    return entries


def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}


def _begin(corpus: Path, provenance: list[dict[str, Any]], overwrite: bool) -> bool:
    """Open the corpus's folder; whether the corpus is finished already."""
    recorded = corpus / PROGRESS / "provenance.json"
    libraries = recorded.with_name("libraries.json")
    if overwrite and corpus.exists():
        others = any(path.name not in (LOCK, PROGRESS) for path in corpus.iterdir())
        if not recorded.is_file() and not (corpus / MANIFEST).is_file() and others:
            raise ValueError(
                f"got folder {corpus} with files that are no corpus, need a corpus or an empty folder: "
                "choose another name"
            )
        _clear(corpus, recorded)
    elif (corpus / MANIFEST).is_file():
        _same(read_manifest(corpus)["provenance"], provenance, corpus)
        return True
    elif recorded.is_file():
        _same(json.loads(recorded.read_text()), provenance, corpus)
        if libraries.is_file() and (begun := json.loads(libraries.read_text())) != _libraries():
            raise ValueError(
                f"got corpus {corpus} begun with {begun}, now {_libraries()}, need the same to continue it: install "
                "those, or pass overwrite=true"
            )
        for temporary in corpus.rglob(".*.tmp*"):  # of killed workers
            temporary.unlink(missing_ok=True)
    recorded.parent.mkdir(parents=True, exist_ok=True)
    write_json(libraries, _libraries())
    write_json(recorded, provenance)
    return False


def _same(found: list[dict[str, Any]], need: list[dict[str, Any]], corpus: Path) -> None:
    if found != need:
        raise ValueError(
            f"got corpus {corpus} of another config, tokenizer, input file or package version "
            f"({_first_difference(found, need)}), "
            "need the same to continue it: choose another name, or pass overwrite=true"
        )


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
        for key in {**new, **old}:
            if old.get(key) != new.get(key):
                return f"{key} of {new['source']} was {old.get(key)!r}, now {new.get(key)!r}"
    return "an entry that this version does not know"


def _survey(config: PrepareConfig, rule: Cut, corpus: Path) -> Survey:
    """The listing in numbers: gone through once, so that what it refuses is refused before hours of work."""
    path = corpus / PROGRESS / "listing.json"
    if path.is_file():
        return Survey(**json.loads(path.read_text()))
    found = survey(config.sources, rule, stop=config.on_error == "stop")
    write_json(path, found._asdict())
    return found


def _make_shards(config: PrepareConfig, rule: Cut, found: Survey, asset: Path, vocab: Vocabulary, corpus: Path) -> None:
    """Make every shard whose record is missing."""
    setup = Setup(corpus, asset, vocab, config.device, config.on_error, config.augment, config.salt)
    progress = _Shown(sum(found.shards.values()), len(list((corpus / PROGRESS).glob("*-*.json"))))
    with ray_session(config.workers, config.ray_address) if config.engine == "ray" else nullcontext() as ray:
        run = partial(_run, config, rule, progress, ray)
        if config.near_duplicates == "keep":
            run(setup, ("train", "val"))
            return
        run(setup._replace(sketch=True), ("val",))
        held_out = corpus / PROGRESS / "held-out.npz"
        sketches = [
            path.with_suffix(".npz") for path in _expected(config, found, corpus) if path.name.startswith("val-")
        ]
        write_bytes(held_out, packed(joined([unpacked(path) for path in sketches])))
        near = {"held_out": held_out, "near_bits": config.near_bits, "near_overlap": config.near_overlap}
        run(setup._replace(**near), ("train",))


def _run(config: PrepareConfig, rule: Cut, progress: "_Shown", ray: Any, setup: Setup, splits: tuple[str, ...]) -> None:
    """One pass over the chunks of some splits; `ray` None: by processes."""
    list_chunks = partial(unfinished, config, rule, setup.corpus, splits)
    if ray is not None:
        made = in_ray(ray, list_chunks, setup, config.workers)
    else:
        gpus = torch.cuda.device_count() if config.device == "cuda" else 0
        made = in_processes(list_chunks(), setup, config.workers or gpus or len(os.sched_getaffinity(0)))
    with closing(made):
        for record in made:
            progress.add(record)


def unfinished(config: PrepareConfig, rule: Cut, corpus: Path, splits: tuple[str, ...]) -> Iterator[Chunk]:
    """The chunks of these splits whose shard is not there, or not whole; ValueError if one lists otherwise now."""
    for chunk in cut(config.sources, rule):
        if chunk.split not in splits:
            continue
        path = _progress_file(corpus, chunk.split, chunk.source, chunk.number)
        record = json.loads(path.read_text()) if path.is_file() else None
        if record is None or not _whole(corpus, record):
            yield chunk
        elif record["listed"] != chunk.digest():
            raise ValueError(
                f"got other documents from source {chunk.source!r} than when shard {chunk.number} of {chunk.split} "
                "was made, need the same to continue: put the input back as it was, or pass overwrite=true"
            )


def _progress_file(corpus: Path, split: str, source: str, number: int) -> Path:
    return corpus / PROGRESS / f"{Chunk(split, source, number, []).stem}.json"


def _expected(config: PrepareConfig, found: Survey, corpus: Path) -> list[Path]:
    """Records that there are in the end, in order of source, split and number."""
    return [
        _progress_file(corpus, split, name, number)
        for name in config.sources
        for split in ("train", "val")
        for number in range(found.shards.get(f"{split}/{name}", 0))
    ]


def _whole(corpus: Path, record: dict[str, Any]) -> bool:
    """Whether the files of a record are there, with as many tokens as it says."""
    shard = record["shard"]
    if "listed" not in record:
        return False
    if not shard["documents"]:
        return True
    tokens = corpus / record["split"] / record["source"] / shard["file"]
    others = ["index.npz", *(["mask.bin"] if shard["mask"] else [])]
    paths = [tokens, *(tokens.with_name(shard["file"].replace("tokens.bin", other)) for other in others)]
    return all(path.is_file() for path in paths) and tokens.stat().st_size == shard["bytes"]


def _manifest(
    config: PrepareConfig, vocab: Vocabulary, provenance: list[dict[str, Any]], found: Survey, corpus: Path
) -> dict[str, Any]:
    """The manifest, out of the records; writes the list of what was skipped beside it."""
    expected, there = set(_expected(config, found, corpus)), set((corpus / PROGRESS).glob("*-*.json"))
    if expected != there:
        differ = ", ".join(path.stem for path in sorted(expected ^ there)[:3])
        raise ValueError(
            f"got sources that list otherwise than at the start (shards {differ}), need an input that stays as it is: "
            "put it back, or pass overwrite=true"
        )
    splits: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    skipped: Counter[str] = Counter()
    attribution, digest = [], hashlib.sha256()
    partial_file = corpus / f".{SKIPPED}.tmp"
    with open(partial_file, "wb") as lines:
        for name, config_ in config.sources.items():
            source = source_of(config_)
            attribution += [{"source": name, **credit} for credit in source.attribution(config_)]
            for split, entries in splits.items():
                shards = []
                for number in range(found.shards.get(f"{split}/{name}", 0)):
                    record = json.loads(_progress_file(corpus, split, name, number).read_text())
                    shards.append(record["shard"])
                    for kind, place, reason in record["skipped"]:
                        skipped[kind] += 1
                        entry = {"source": name, "split": split, "kind": kind, "place": place, "reason": reason}
                        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
                        digest.update(line)
                        lines.write(line)
                entry = source_record(source.kind, shards)
                if entry["documents"]:
                    entries[name] = entry
        lines.flush()
        os.fsync(lines.fileno())
    if skipped:
        os.replace(partial_file, corpus / SKIPPED)
    else:
        partial_file.unlink()
    return {
        "name": config.name,
        "vocab_hash": vocab.hash,
        "tokenizer": config.tokenizer,
        "token_dtype": token_dtype(vocab.size),
        "splits": splits,
        "provenance": provenance,
        "libraries": _libraries(),
        "attribution": attribution,
        "listed": found.listed,
        "repeated_ids": found.repeated_ids,
        "skipped": dict(sorted(skipped.items())),
        "skipped_file": {"file": SKIPPED, "sha256": digest.hexdigest()} if skipped else None,
    }


def _summary(manifest: dict[str, Any], corpus: Path) -> None:
    """Say on stderr what is not in the shards."""
    if manifest["skipped"]:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in manifest["skipped"].items())
        listed, skipped = sum(manifest["listed"].values()), sum(manifest["skipped"].values())
        print(f"prepare: skipped {skipped:,} of {listed:,}: {kinds}; see {corpus / SKIPPED}", file=sys.stderr)
    for source, number in manifest["repeated_ids"].items():
        print(f"prepare: {number:,} documents of {source} bear the id of an earlier one; kept", file=sys.stderr)


class _Shown:
    """How far it is: shards, and what those made now hold."""

    def __init__(self, shards: int, finished: int) -> None:
        self._bar = Progress("prepare: shard", shards, finished, stream=sys.stderr)
        self._shards, self._done = shards, finished
        self._count: Counter[str] = Counter()

    def add(self, record: dict[str, Any]) -> None:
        self._done += 1
        shard = record["shard"]
        self._count.update(documents=shard["documents"], images=shard["images"], tokens=shard["tokens"])
        self._count["skipped"] += len(record["skipped"])
        text = ", ".join(f"{number:,} {what}" for what, number in self._count.items())
        self._bar.update(min(self._done, self._shards), text)
        if self._done >= self._shards:
            self._bar.close()
