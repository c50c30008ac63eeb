"""A run as one file: the model built from it answers bit for bit, and a run begins from it as from the run."""

import json
import resource
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moma import __version__, checkpoint
from moma.checkpoint import Lazy
from moma.config import compose
from moma.export import export, main, open_parameters, read_export
from moma.hf_chameleon import write_lazily
from moma.model.transformer import ARCHITECTURE, Architecture, ModelConfig, Transformer, build_model
from moma.objectives import NextTokenConfig
from moma.schema import build, plain

DATA = {"rows": 2, "row_length": 96, "images": 4, "corpus": "/home/someone/corpus"}


def write_run(folder: Path, model: Transformer, variant, steps=(3, 12)) -> Path:
    """A run folder whose checkpoints differ in their first parameter."""
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    architecture = Architecture(config, variant.feed_forward, variant.attention, variant.depth)
    identity = {
        **plain(architecture), "objective": plain(NextTokenConfig()), "tokenizer": "/home/someone/tokenizers/small",
        "data": DATA, "vocab_hash": variant.vocabulary.hash,
    }  # fmt: skip
    meta = {
        "config": identity, "vocab_hash": variant.vocabulary.hash, "precision": "fp32", "git": {"commit": "abc"},
    }  # fmt: skip
    for step in steps:
        with torch.no_grad():
            next(model.parameters()).add_(0.01 * step)
        state = {"model": checkpoint.model_state(model), "optimizer": {"state.w.step": torch.ones(())}}
        checkpoint.save(folder / "checkpoints", step, state, meta, keep_last=0)
    return folder


@pytest.fixture
def run(tmp_path, variants, make_model):
    variant = variants["threshold"]
    return write_run(tmp_path / "run", make_model(variant, dtype=torch.float32), variant)


def exported(run_dir, out, *overrides):
    export(compose("export", [f"run={run_dir}", f"out={out}", *overrides]).config)
    return out


@pytest.mark.parametrize("name", ["threshold", "mod_quota_untied"])
def test_the_model_of_a_file_answers_bit_for_bit(variants, make_model, make_batch, tmp_path, capsys, name):
    variant = variants[name]
    model = make_model(variant, dtype=torch.float32, aux_routers=True)
    for buffer in model.buffers():
        buffer += torch.rand(buffer.shape).to(buffer.dtype)  # routing state that no fresh model has
    run, out = write_run(tmp_path / "run", model, variant), tmp_path / "new" / "model.safetensors"
    assert main(compose("export", [f"run={run}", f"out={out}"])) == 0
    assert capsys.readouterr().out == f"{out}: 0.000 GB of tensors, step 12 of {run}\n"
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    architecture = build(Architecture, {part: config[part] for part in ARCHITECTURE})
    vocab = variant.vocabulary
    again = build_model(architecture, vocab.size, vocab.modalities, seed=7, aux_routers=True)
    again.load_state_dict(load_file(out))
    batch = make_batch(vocab, 0)
    with torch.no_grad():
        logits = [
            m.head(m(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups)[0]) for m in (model, again.eval())
        ]
    assert torch.equal(*logits)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert "someone" not in out.read_bytes().decode("latin-1")
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]


def test_a_file_says_whose_it_is(run, tmp_path, variants):
    out = exported(run, tmp_path / "model.safetensors", "step=3")
    tensors, record = read_export(out)
    own = checkpoint.read_meta(checkpoint.by_step(run / "checkpoints")[3])["config"]
    assert record["step"] == 3 and record["git"] == {"commit": "abc"} and record["moma"] == __version__
    assert record["vocab_hash"] == record["config"]["vocab_hash"] == variants["threshold"].vocabulary.hash
    assert {part: record["config"][part] for part in ARCHITECTURE} == {part: own[part] for part in ARCHITECTURE}
    assert record["config"]["data"] == {"rows": 2, "row_length": 96, "images": 4}
    assert record["config"]["tokenizer"] == "small"
    stored = checkpoint.read_tensors(checkpoint.by_step(run / "checkpoints")[3], "model")
    assert tensors.keys() == stored.keys()
    for name, lazy in tensors.items():
        assert (lazy.shape, lazy.dtype) == (tuple(stored[name].shape), stored[name].dtype)
        assert torch.equal(lazy.fetch(), stored[name])


def test_parameters_come_from_a_run_or_its_file(run, tmp_path):
    of_run, of_file = open_parameters(run), open_parameters(exported(run, tmp_path / "model.safetensors"))
    assert of_run[0].keys() == of_file[0].keys()
    assert all(torch.equal(of_run[0][name].fetch(), lazy.fetch()) for name, lazy in of_file[0].items())
    for path in (*ARCHITECTURE, "objective", "vocab_hash"):
        assert of_run[1]["config"][path] == of_file[1]["config"][path]
    assert of_run[1]["step"] == of_file[1]["step"] == 12
    with pytest.raises(ValueError, match="got init_from=.*nowhere without a checkpoint, need a trained run: train it"):
        open_parameters(tmp_path / "nowhere")


def test_one_tensor_at_a_time_is_in_memory_and_each_is_aligned(tmp_path):
    dtypes = (torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64)
    made = {f"t{n}": torch.arange(7).to(dtype) for n, dtype in enumerate(dtypes)}
    made |= {"scalar": torch.tensor(3.0), "turned": torch.arange(6.0).view(2, 3).T, "none": torch.zeros(0, 4)}
    alive: list[weakref.ref] = []

    def fetch(tensor):
        assert not any(reference() is not None for reference in alive)
        copy = tensor.clone()
        alive.append(weakref.ref(copy))
        return copy

    lazies = {n: Lazy(tuple(t.shape), t.dtype, lambda t=t: fetch(t)) for n, t in made.items()}
    path = tmp_path / "file.safetensors"
    n_bytes = write_lazily(path, lazies, {"any": "thing"})
    assert len(alive) == len(made) and n_bytes == sum(tensor.nbytes for tensor in made.values())
    again = load_file(path)
    assert again.keys() == made.keys()
    for name, tensor in made.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header.pop("__metadata__") == {"any": "thing"}
    assert all(entry["data_offsets"][0] % made[name].dtype.itemsize == 0 for name, entry in header.items())
    with pytest.raises(ValueError, match="got w as torch.complex64, need one of torch.float64, .*: convert it"):
        write_lazily(path, {"w": Lazy((1,), torch.complex64, lambda: torch.ones(1).to(torch.complex64))}, {})


def test_what_export_refuses(run, tmp_path):
    out = exported(run, tmp_path / "model.safetensors", "step=3")
    before = out.read_bytes()
    with pytest.raises(ValueError, match="got out=.*, which is there already, need a new file: give another, or over"):
        exported(run, out)
    with pytest.raises(
        ValueError, match=r"got step=4, need one that .*run has a checkpoint of \(3, 12\): correct step"
    ):
        exported(run, out, "overwrite=true", "step=4")
    assert out.read_bytes() == before
    assert read_export(exported(run, out, "overwrite=true"))[1]["step"] == 12
    with pytest.raises(ValueError, match=r"got out=.*, a folder, need a file: set out=.*run/model.safetensors"):
        exported(run, run)
    with pytest.raises(ValueError, match="got run=.*nowhere without a checkpoint, need a trained or imported run"):
        exported(tmp_path / "nowhere", tmp_path / "other")


def test_a_full_disk_leaves_the_file_that_was_there(run, tmp_path):
    out = exported(run, tmp_path / "model.safetensors")
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"^got no .*rs \(.*File too large\), need 1 MiB free there \(\d+ MiB are\) and"
        ):
            exported(run, out, "overwrite=true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OSError, match="^got no .*File exists.* and the right to write: make room, or give another"):
        exported(run, out / "below")
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run"]


def test_files_of_others_and_damaged_ones_are_refused(run, tmp_path):
    out = exported(run, tmp_path / "model.safetensors")
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"got a damaged or missing .*, need a whole file: copy it again"):
        read_export(out)
    tensors = {"w": torch.ones(2)}
    good = {"config": "{}", "vocab_hash": '"a"', "step": "1", "git": "{}", "moma": '"0"'}
    for name, value in (("config", None), ("step", '"1"'), ("git", "[" * 100_000), ("vocab_hash", "a")):
        metadata = {k: v for k, v in (good | {name: value}).items() if v is not None}
        save_file(tensors, out, metadata=metadata)
        with pytest.raises(ValueError, match=f"got .* without {name} of its run in the metadata, need a file that"):
            read_export(out)
    save_file(tensors, out)
    with pytest.raises(ValueError, match="without config of its run in the metadata, need a file that `moma export`"):
        open_parameters(out)
