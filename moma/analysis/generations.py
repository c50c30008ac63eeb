"""What a model generated, as the page shows it: the generations.json of a folder, by prompt.

Refuses a folder without the file and records without prompt and kind.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma.analysis.runs import Run, with_routers


@dataclass(frozen=True)
class Generations:
    """What one model generated: entries of a generations.json; `mode` is its routing mode."""

    label: str
    mode: str
    folder: Path
    entries: tuple[dict[str, Any], ...]


def read_generations(folder: Path, runs: Sequence[Run]) -> Generations:
    """The generations.json in `folder`, labelled with the variant of its run; raises ValueError."""
    path = folder / "generations.json"
    if not path.is_file():
        raise ValueError(f"got no {path}, need a folder that `moma generate` wrote: check generations=[...]")
    try:
        record = json.loads(path.read_text())
        entries = tuple(_by_prompt(record["generations"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"got a damaged {path} ({type(error).__name__}: {error}), need generations with prompt and kind: "
            "run moma generate again"
        ) from None
    label = _variant_at(str(record.get("run", "")), runs) or str(record.get("feed_forward") or folder.name)
    return Generations(label, str(record.get("mode", "?")), folder, entries)


def _variant_at(recorded: str, runs: Sequence[Run]) -> str | None:
    """Variant of the run at the path `recorded`, else of the runs of that name; None if those are several."""
    path = Path(recorded)
    for run in runs:
        if path.resolve() in {one.folder.resolve() for one in with_routers([run])}:
            return run.variant
    # The folders were moved, or the path was relative to another folder: the name must do.
    named = {run.variant for run in runs if path.name in {one.name for one in with_routers([run])}}
    return named.pop() if len(named) == 1 else None


def _by_prompt(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Records of single samples as entries: pictures of one prompt together in `files`, captions one by one."""
    drawn: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "caption":
            yield {key: record.get(key) for key in ("kind", "text", "real")} | {"prompt": record["prompt"]}
        elif str(record.get("file", "")).endswith(".png"):
            first = {"kind": "picture", "prompt": record["prompt"], "files": [], "real": record.get("real")}
            drawn.setdefault(record["prompt"], first)["files"].append(record["file"])
    yield from drawn.values()
