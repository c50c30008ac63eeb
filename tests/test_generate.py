"""`moma generate` on a run of a made-up corpus: train, then draw and name; files, seeds, refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import moma.generate as module
from moma.config import compose
from moma.data.synthetic import WORDS, write_synthetic
from moma.generate import file_stem, grid, main
from moma.train import main as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, corpus, _ = write_synthetic(folder, pairs=60, texts=40)
    common = [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}",
        "data.rows=2", "data.row_length=64", "data.images=3", "model.dim=32", "model.n_layers=2", "model.n_heads=2",
        "eval.interval=null", "duration={steps:4}", "precision=fp32", "optim.lr=1e-2",
    ]  # fmt: skip
    train(compose("train", [*common, f"run_dir={folder / 'dense'}", "feed_forward=dense"]))
    train(compose("train", [*common, f"run_dir={folder / 'base'}"]))
    second = ["objective=aux_routers", f"init_from={folder / 'base'}"]
    train(compose("train", [*common, f"run_dir={folder / 'aux'}", *second]))
    return folder


def run(out, run_dir, *overrides):
    composed = compose("generate", [f"run={run_dir}", f"out={out}", "write=codes", "samples=2", *overrides])
    assert main(composed) == 0
    return json.loads((out / "generations.json").read_text())


@pytest.mark.parametrize("name", ["dense", "aux"])
def test_names_are_drawn_and_pictures_named(runs, tmp_path, name):
    made = run(tmp_path, runs / name, "held_out=3", "prompts=[sun and moon, ../../etc/passwd]")
    drawn = [g for g in made["generations"] if g["kind"] == "picture"]
    named = [g for g in made["generations"] if g["kind"] == "caption"]
    assert made["mode"] == ("causal" if name == "dense" else "aux")
    assert made["seed"] == 0 and made["step"] == 4 and made["precision"] == "fp32"
    assert len(drawn) == (2 + 3) * 2 and len(named) == 3 * 2
    assert [g["sample"] for g in drawn] == [0, 1] * 5 and sum(g["held_out"] for g in drawn) == 6
    assert {g["prompt"] for g in named} <= set(WORDS) and all(isinstance(g["text"], str) for g in named)
    assert drawn[2]["file"] == "001-etc-passwd-0.npy"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(g["file"] for g in drawn), "generations.json"])
    for g in drawn:
        codes = np.load(tmp_path / g["file"], allow_pickle=False)
        assert codes.shape == (16,) and 0 <= codes.min() <= codes.max() < 32


def test_the_same_seed_the_same_files_whatever_the_batch(runs, tmp_path):
    asked = ["held_out=2", "prompts=[sun]"]
    files = []
    for number, extra in enumerate((["seed=1"], ["seed=1", "batch_rows=3"], ["seed=2"])):
        made = run(tmp_path / str(number), runs / "aux", *asked, *extra)
        one = [g for g in made["generations"] if g["prompt"] == "sun" and g["kind"] == "picture"]
        files.append([np.load(tmp_path / str(number) / g["file"]) for g in one[:2]])
    assert np.array_equal(files[0], files[1])
    assert not np.array_equal(files[0], files[2]) and not np.array_equal(files[0][0], files[0][1])


class StubPictures:
    """Stands in for an image tokenizer of 16 codes: a picture's grey is its first code."""

    size = 8

    def encode(self, images):
        return np.array([[image.convert("L").getpixel((0, 0)) // 8] * 16 for image in images])

    def decode(self, codes):
        assert codes.shape[1:] == (16,)
        return [Image.new("RGB", (8, 8), (int(c[0]) * 8,) * 3) for c in codes]


def test_pictures_as_png_with_a_grid(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_image_tokenizer", lambda *_: StubPictures())
    Image.new("RGB", (20, 20), (40, 40, 40)).save(tmp_path / "mine.png")
    asked = [f"pictures=[{tmp_path / 'mine.png'}]", "held_out=2", "prompts=[sun]", "write=png"]
    made = run(tmp_path / "out", runs / "aux", *asked)
    drawn = [g for g in made["generations"] if g["kind"] == "picture"]
    assert [g["prompt"] for g in made["generations"] if g["kind"] == "caption"][:2] == ["mine.png"] * 2
    for g in drawn:
        assert Image.open(tmp_path / "out" / g["file"]).size == (8, 8)
    sheet = Image.open(tmp_path / "out" / "grid.png")
    assert sheet.size == (160 + 3 * 12, 3 * 12 + 4), "label, real picture, two samples; one line per name"
    first = Image.open(tmp_path / "out" / drawn[0]["file"]).getpixel((0, 0))
    assert sheet.getpixel((160 + 12, 4)) == first and sheet.getpixel((160, 4)) == (255, 255, 255)


def test_file_names_stay_inside_the_folder():
    assert file_stem(3, "Sheaf of Rice!", 1) == "003-sheaf-of-rice-1"
    for label in ("../../x", "/etc/passwd", "..", "", "a\0b\\c", "é" * 300, "x" * 300):
        stem = file_stem(0, label, 0)
        assert set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(stem) < 60
    assert file_stem(0, "日本", 2) == "000-2"


def test_a_grid_with_a_missing_picture():
    sheet = grid([("a name of many words that must be wrapped 日本", [None, Image.new("RGB", (4, 4), "red")])], 10)
    assert sheet.size == (160 + 28, 18) and sheet.getpixel((160 + 14, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("aux", ["mode=train", "held_out=1"], r"got mode=train for generation, need one of aux, .*objective=aux"),
        ("base", ["held_out=1"], "got a model without auxiliary routers, need them to generate in mode aux: use"),
        ("aux", ["held_out=1", "write=png"], "got write=png but no image tokenizer in .*, need vqgan.json and vqgan"),
        ("aux", ["pictures=[x.png]"], "got pictures to name but no image tokenizer in .*run `moma train_vq`"),
        ("aux", ["held_out=99"], r"got held_out=99, need at most the \d+ names of the val split of .*: lower held_out"),
        ("aux", ["prompts=['  ']"], "got the prompt '  ', need words: leave it out"),
        ("aux", [], "got nothing to generate from, need prompts, pictures or held_out: add held_out=8"),
        ("aux", ["samples=0", "held_out=1"], "got samples=0, need at least 1: change samples"),
        ("aux", ["picture.top_p=2", "held_out=1"], r"picture: got top_p=2.0, need above 0 and at most 1"),
        ("aux", ["device=cuda", "held_out=1"], "got device=cuda, need a GPU"),
        ("nowhere", ["held_out=1"], "got .*nowhere without a checkpoint, need a trained run"),
    ],
)
def test_refusals(runs, tmp_path, name, overrides, text):
    if torch.cuda.is_available() and "device=cuda" in overrides:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "out", runs / name, *overrides)
    assert not (tmp_path / "out").exists()


def test_a_dense_run_is_causal_in_every_mode(runs, tmp_path):
    assert run(tmp_path, runs / "dense", "mode=train", "prompts=[sun]")["mode"] == "causal"


def test_the_default_folder_is_the_runs_own(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "copy")
    composed = compose("generate", [f"run={tmp_path / 'copy'}", "prompts=[sun]", "write=codes"])
    assert composed.config.samples == 4 and replace(composed.config, seed=1).seed == 1
    main(composed)
    assert (tmp_path / "copy" / "generations" / "generations.json").is_file()
