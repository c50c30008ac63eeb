"""`moma compare`: run folders -> eta, scaling fits, tables and figures: report.html, comparison.json, figures/*.png.

    moma compare runs=['runs/sweep/*'] out=FOLDER         folders, globs, and W&B's offline folders, in any mixture

Dense runs are the baseline of the sparse ones of their size and seeds; a run that trained auxiliary routers is joined
to the run it started from. Unfinished runs are listed and left out. All work is in `moma/analysis`, which reads files
only. Refuses what it refuses.
"""

from dataclasses import dataclass
from pathlib import Path

from moma.analysis import compare_report
from moma.analysis.study import read_study
from moma.config import Composed


@dataclass(frozen=True)
class CompareConfig:
    """`runs`: run folders or globs of them; `out`: the folder to write into."""

    runs: tuple[str, ...]
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "got no runs, need a dense and a sparse run folder: runs=[RUN,RUN] or runs=['runs/sweep/*']"
            )


def main(composed: Composed) -> int:
    """`moma compare runs=[...] out=FOLDER`: writes the comparison and prints eta; returns 0."""
    config: CompareConfig = composed.config
    found = compare_report.compare(read_study(config.runs))
    path = compare_report.write(found, config.out)
    print("\n".join([*compare_report.summary_lines(found), f"wrote {path}"]))
    return 0
