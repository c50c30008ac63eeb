"""A profiler trace of some steps of a run: RUN/profile/steps-10-12-rank0.json, for chrome://tracing or Perfetto."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to record: `steps` of them after the first `start`; 0: none."""

    start: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 0:
            raise ValueError(
                f"got profile.start={self.start} and profile.steps={self.steps}, need 0 or more: steps=0 turns it off"
            )


class Trace:
    """Records what `config` asks for, on this rank; tell it before every step how many are done, and close it."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self._config, self._folder, self._rank = config, folder, rank
        self._first, self._profile = 0, None

    def before(self, done: int) -> None:
        """Start or end the recording where `done` steps are done."""
        inside = self._config.start <= done < self._config.start + self._config.steps
        if inside and self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._first, self._profile = done + 1, profile(activities=activities, record_shapes=True)
            self._profile.start()
        elif not inside and self._profile is not None:
            self._end(done)

    def _end(self, done: int) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{done}-rank{self._rank}.json"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        print(f"wrote {path}")

    def close(self, done: int) -> None:
        """Write what is being recorded."""
        if self._profile is not None:
            self._end(done)
