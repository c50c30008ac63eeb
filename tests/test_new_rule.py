"""A selection rule of one's own: one file, one dict line, one YAML, and every parametrised test runs on it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

FILE = '''
"""Positive: an expert computes every token whose logit is above 0."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from moma.model.routing.rule import Choice, Rule


@dataclass(frozen=True)
class PositiveConfig:
    kind: Literal["positive"] = "positive"


def share(config, group, n_experts):
    return Fraction(1, 2)


def alone(config, logit_NE, state):
    return logit_NE > 0


def gate(config, logit_NE, selected_NE):
    return torch.sigmoid(logit_NE)


def choose(config, logit_NE, group):
    selected_NE = logit_NE > 0
    if group.valid_N is not None:
        selected_NE = selected_NE & group.valid_N[:, None]
    return Choice(selected_NE, gate(config, logit_NE, selected_NE), bound=logit_NE.numel())


RULE = Rule(PositiveConfig, share, choose, gate, alone)
'''

DICT_LINE = """
import positive
from moma.model.routing import SELECTIONS

SELECTIONS["positive"] = positive.RULE
"""

YAML = """
kind: sparse
experts: {text: 4, image: 4}
selection: {kind: positive}
"""

SCRIPT = """
import dict_line, pathlib, pytest, sys
from moma.cli import main
from moma.data.synthetic import write_synthetic

tokenizer, corpus, _ = write_synthetic(pathlib.Path("made"), pairs=60, texts=60)
shape = ["data.rows=2", "data.row_length=64", "data.images=3", "model.dim=32", "model.n_layers=2", "model.n_heads=2"]
more = [f"tokenizer={tokenizer}", "feed_forward=moe_positive", f"hydra.searchpath=[file://{pathlib.Path.cwd()}/conf]"]
run = ["duration={tokens: 1024}", "run_dir=run", "eval.interval=null", "optim.lr=1e-2"]
failed = main(["train", *shape, *more, *run, f"data.corpus={corpus}"]) or main(["describe", *shape, *more])
tests = ["-q", "-p", "no:cacheprovider", "-k", "positive", "--rootdir", *sys.argv[1:]]
sys.exit(failed or pytest.main(tests))
"""


def test_a_rule_of_ones_own(tmp_path):
    (tmp_path / "conf" / "feed_forward").mkdir(parents=True)
    (tmp_path / "positive.py").write_text(FILE)
    (tmp_path / "dict_line.py").write_text(DICT_LINE)
    (tmp_path / "do_it.py").write_text(SCRIPT)
    (tmp_path / "conf" / "feed_forward" / "moe_positive.yaml").write_text(YAML)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COVERAGE_PROCESS_START": ""}
    files = ["model/test_feed_forward.py", "model/test_transformer.py", "model/test_block.py"]
    done = subprocess.run(
        [sys.executable, "do_it.py", str(TESTS.parent), *(str(TESTS / name) for name in files)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").is_dir()
    passed = next(line for line in reversed(done.stdout.splitlines()) if " passed" in line)
    assert int(passed.split(" passed")[0].split()[-1]) >= 40 and "failed" not in passed, passed
