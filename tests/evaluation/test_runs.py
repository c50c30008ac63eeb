"""A run folder back as a model: the parameters that were saved, auxiliary routers where trained, refusals."""

import shutil

import pytest
import torch

from moma import checkpoint
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.evaluation.runs import load_run
from moma.train import main


def overrides(tokenizer, corpus, run_dir):
    return [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}",
        "data.rows=2", "data.row_length=64", "data.images=3", "model.dim=32", "model.n_layers=2", "model.n_heads=2",
        "eval.interval=null", "duration={steps:2}", "precision=fp32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, corpus, _ = write_synthetic(folder, pairs=40, texts=40)
    main(compose("train", overrides(tokenizer, corpus, folder / "base")))
    second = ["objective=aux_routers", f"init_from={folder / 'base'}"]
    main(compose("train", [*overrides(tokenizer, corpus, folder / "aux"), *second]))
    return folder


@pytest.mark.parametrize("name", ["base", "aux"])
def test_the_newest_checkpoint_comes_back(runs, name):
    loaded = load_run(runs / name, "cpu")
    stored = checkpoint.read_tensors(loaded.checkpoint, "model")
    own = loaded.model.state_dict()  # parameters and routing state
    assert own.keys() == stored.keys() and all(torch.equal(own[n], stored[n]) for n in own)
    assert any(".aux." in n for n in own) == (name == "aux")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.checkpoint.name == "step-00000002" and loaded.step == 2 and loaded.precision == "fp32"
    assert loaded.corpus == runs / "corpus" and loaded.tokenizer == runs / "tokenizer"


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a checkpoint, need a trained run: give the folder of `moma train`"):
        load_run(tmp_path, "cpu")


def test_a_changed_tokenizer_is_refused(runs):
    ranks = runs / "tokenizer" / "text.tiktoken"
    kept = runs / "kept"
    shutil.copy(ranks, kept)
    lines = ranks.read_bytes().splitlines()
    lines[0], lines[1] = lines[1].split()[0] + b" 0", lines[0].split()[0] + b" 1"
    ranks.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"with hash \w+, need the one .* was trained with, hash \w+: restore that"):
        load_run(runs / "base", "cpu")
    shutil.copy(kept, ranks)
    load_run(runs / "base", "cpu")
