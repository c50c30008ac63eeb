"""`moma prepare` under kill -9 and by Ray: the finished corpus has the bytes of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moma.cli import main
from moma.data.shards import read_manifest
from moma.tokenizer.text import RANKS_FILE, write_ranks
from moma.tokenizer.vocab import write_vocabulary
from moma.vqgan.model import VqConfig, VqModel, save_vq

# Imports once, what is first needed on the way too; then every line on stdin, a list of arguments, is a `moma` process
# of its own with a process group of its own. Answers its number, then its exit status.
LAUNCHER = """
import gc, json, os, sys
import moma.cli, moma.config, moma.prepare, torch._dynamo
moma.config.compose("prepare", [])
gc.freeze()
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os._exit(moma.cli.main(json.loads(line)))
    os.setpgid(process, process)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


@contextmanager
def _launcher(log: Path) -> Iterator["subprocess.Popen[str]"]:
    with open(log, "w") as errors:
        command = [sys.executable, "-c", LAUNCHER]
        launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
        try:
            yield launcher
        finally:
            launcher.kill()
            launcher.communicate()


def _run(launcher: "subprocess.Popen[str]", arguments: list[str], kill: tuple[Path, int, float] | None = None) -> int:
    """Exit status of one command; `kill` (corpus, shards, seconds): kill -9 of all its processes, those seconds after
    the corpus has so many finished shards."""
    assert launcher.stdin is not None and launcher.stdout is not None
    launcher.stdin.write(json.dumps(arguments) + "\n")
    process = int(launcher.stdout.readline())
    if kill is not None:
        (corpus, shards, seconds), start = kill, time.monotonic()
        while time.monotonic() < start + 60 and len(list(corpus.glob(".progress/*-*.json"))) < shards:
            time.sleep(0.002)
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    return int(launcher.stdout.readline())


@pytest.fixture
def pages(tmp_path: Path) -> list[str]:
    """A tokenizer and interleaved pages of small pictures, one of them broken: the command that prepares them."""
    asset, folder = tmp_path / "asset", tmp_path / "pages"
    folder.mkdir()
    save_vq(VqModel(VqConfig(resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, n_embed=16)), asset)
    write_ranks(asset / RANKS_FILE, {bytes([i]): i for i in range(256)})
    write_vocabulary(asset, text_size=256, image_codes=16, image_grid=(8, 8))
    draw = np.random.default_rng(0)
    with open(folder / "pages.jsonl", "w") as lines:
        for page in range(60):
            Image.fromarray(draw.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / f"{page}.png")
            segments = [{"t": f"Page {page}."}, {"i": f"{page}.png", "cap": "noise"}, {"t": "x" * (page % 7 * 20)}]
            lines.write(json.dumps({"id": f"page {page}", "segs": segments}) + "\n" + "no JSON\n" * (page % 20 == 9))
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:50])
    source = f"{{kind: interleaved, documents: {folder}/pages.jsonl, pictures: {folder}}}"
    settings = {"name": "c", "tokenizer": asset, "val_fraction": 0.2, "shard_tokens": 140, "near_duplicates": "drop"}
    without = ["~sources.twemoji", "~sources.openmoji", "~sources.web", "~sources.asv"]
    return ["prepare", *without, f"+sources.pages={source}", *(f"{key}={value}" for key, value in settings.items())]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_any_moment_and_continued(tmp_path: Path, pages: list[str]) -> None:
    whole, stopped, draw = tmp_path / "whole" / "c", tmp_path / "stopped" / "c", random.Random(0)
    command = [*pages, f"corpora={stopped.parent}"]
    with _launcher(tmp_path / "log") as launcher:
        assert _run(launcher, [*pages, f"corpora={whole.parent}", "workers=1"]) == 0, (tmp_path / "log").read_text()
        statuses = [_run(launcher, [*command, "workers=1"], (stopped, 0, draw.uniform(0, 0.3)))]
        for shards in range(2, 20, 4):
            statuses.append(_run(launcher, [*command, "workers=1"], (stopped, shards, draw.uniform(0, 0.1))))
        kept = {path: path.stat().st_mtime_ns for path in stopped.rglob("*.tokens.bin")}
        statuses.append(_run(launcher, [*command, "workers=2"], (stopped, 21, draw.uniform(0, 0.1))))
        assert statuses == [signal.SIGKILL] * 7
        assert _run(launcher, [*command, "workers=2"]) == 0, (tmp_path / "log").read_text()
    assert _files(stopped) == _files(whole)
    manifest = read_manifest(whole)
    assert manifest["skipped"] == {"broken_picture": 1, "unreadable": 3}
    assert sum(len(split["pages"]["shards"]) for split in manifest["splits"].values()) > 25
    redone = [path for path, at in kept.items() if path.stat().st_mtime_ns != at]
    assert len(redone) <= 1  # but for one whose record was not written yet


def test_ray_makes_the_same_bytes(tmp_path: Path, pages: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    before = set(Path(tempfile.gettempdir()).glob("ray*"))
    for name, engine in (("processes", "workers=1"), ("ray", "engine=ray")):
        command = [*pages, f"corpora={tmp_path}/{name}", "workers=1", "near_duplicates=keep", engine]
        assert main(command) == 0, capfd.readouterr().err
    assert _files(tmp_path / "processes") == _files(tmp_path / "ray")
    assert set(Path(tempfile.gettempdir()).glob("ray*")) == before


def test_ray_missing(tmp_path: Path, pages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*pages, f"corpora={tmp_path}/c", "engine=ray"]) == 2
    assert "got no package 'ray', need it for engine=ray: pip install 'moma[data]'" in capsys.readouterr().err
