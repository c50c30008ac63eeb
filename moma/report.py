"""`moma report`: run folders -> report.html, its figures and its numbers.

    moma report runs=[runs/.../tiny-dense-s0,runs/.../tiny-moe_4t4i-aux_routers-s0] out=FOLDER

A run that trained auxiliary routers brings the run it started from along. A `quickstart.json` in `out` adds
the budget and the commands. All work is in `moma/analysis`, which reads files only. Refuses what it refuses,
and an empty list of runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma.analysis import report
from moma.analysis.generations import read_generations
from moma.analysis.runs import collect
from moma.config import Composed


@dataclass(frozen=True)
class ReportConfig:
    """`runs`: run folders; `generations`: folders of `moma generate`; `out`: the folder to write into."""

    runs: tuple[Path, ...]
    generations: tuple[Path, ...] = ()
    out: Path = Path("runs/report")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("got no runs, need at least one run folder: runs=[RUN,RUN]")


def main(composed: Composed) -> int:
    """`moma report runs=[...] out=FOLDER`: writes the report and prints the verdict; returns 0."""
    config: ReportConfig = composed.config
    runs = collect(config.runs)
    generations = [read_generations(folder, runs) for folder in config.generations]
    path = report.write_report(runs, generations, config.out, _quickstart(config.out))
    print("\n".join([*report.summary_lines(runs), f"wrote {path}"]))
    return 0


def _quickstart(out: Path) -> dict[str, Any] | None:
    """What `moma quickstart` recorded beside the report's folder, or in it."""
    for path in (out / "quickstart.json", out.parent / "quickstart.json"):
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"got a damaged {path} ({error}), need JSON: remove it") from None
    return None
