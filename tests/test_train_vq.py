import dataclasses
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from moma.cli import main
from moma.config import compose, raw
from moma.data.sources.emoji import EmojiConfig
from moma.distributed import Ranks
from moma.log import LogConfig
from moma.tokenizer.image import ImageTokenizer
from moma.train_vq import TrainVqConfig, _augment, _Order, _players, _run, collect, read_pictures, train_vq
from moma.vqgan.model import VqConfig, load_vq

TINY = VqConfig(
    resolution=16,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    z_channels=8,
    embed_dim=4,
    n_embed=16,
    ema=True,
    norm_groups=2,
)


def png(seed):
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (24, 24), tuple(random.integers(0, 256, 3).tolist()))
    ImageDraw.Draw(image).ellipse((4, 4, 18, 18), fill=tuple(random.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "train").mkdir()
    for i in range(10):
        (folder / "train" / f"{i}.png").write_bytes(png(i))
    write_tar(folder / "val.tar", {f"{i}.png": png(100 + i) for i in range(4)})
    return folder


@pytest.fixture(scope="module")
def settings(pictures):
    return TrainVqConfig(
        out=pictures / "run",
        cache=pictures / "cache",
        twemoji=0,
        openmoji=0,
        train_paths=(pictures / "train",),
        val_paths=(pictures / "val.tar",),
        model=TINY,
        steps=6,
        batch_size=4,
        perceptual_weight=0.0,
        discriminator_weight=0.3,
        discriminator_start=1,
        quantize_start=1,
        shift=1,
        warmup_steps=1,
        threads=torch.get_num_threads(),
        log=LogConfig(interval=1),
        eval_every=3,
        checkpoint_every=2,
    )


@pytest.fixture
def config(settings, tmp_path):
    return dataclasses.replace(settings, out=tmp_path / "run")


@pytest.fixture(scope="module")
def finished(settings):
    """A run and its result, for several tests."""
    return settings, train_vq(settings)


def metrics(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def test_a_resumed_run_has_the_same_bits(finished, tmp_path, monkeypatch):
    config, result = finished
    stopped = dataclasses.replace(config, out=tmp_path / "stopped")
    from moma import train_vq as module

    def kill(config, pixels, step, real=module._augment):
        if step == 5:  # after the checkpoint of step 4, with step 5 in the metrics already
            raise Killed
        return real(config, pixels, step)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_augment", lambda pixels, config, step: kill(pixels, config, step))
        with pytest.raises(Killed):
            train_vq(stopped)
    assert metrics(stopped)[-1]["step"] == 5
    assert train_vq(stopped) == result
    assert metrics(stopped) == metrics(config)
    for name in ("vqgan.json", "vqgan.safetensors"):
        assert (config.out / "export" / name).read_bytes() == (stopped.out / "export" / name).read_bytes()


def test_results_and_files(finished):
    config, result = finished
    assert result.keys() == {"parameters", "psnr/val", "ssim/val", "usage/val", "perplexity/val"}
    assert 0 < result["psnr/val"] < 60 and 0 < result["usage/val"] <= 1 <= result["perplexity/val"] <= 16
    assert json.loads((config.out / "result.json").read_text()) == result
    steps = [row["step"] for row in metrics(config) if "l1" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    rows = {row["step"]: row for row in metrics(config) if "l1" in row}
    assert rows[1]["discriminator"] == 0 and rows[2]["discriminator"] > 0  # discriminator_start
    assert [row["step"] for row in metrics(config) if "psnr/val" in row] == [3, 6]
    with Image.open(config.out / "grid.png") as grid:
        assert grid.size == (2 * 8 * 16, 4 * 16)
    weights = load_file(config.out / "export" / "vqgan.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert ImageTokenizer.load(config.out / "export").grid == (8, 8)
    assert not any((config.out / "export").rglob("*.tmp"))


def test_training_lowers_the_loss(config):
    plain = dataclasses.replace(config, discriminator_weight=0.0, flip=False, shift=0, eval_every=40)
    train_vq(dataclasses.replace(plain, steps=40, lr=1e-2, checkpoint_every=40))
    losses = [row["l1"] for row in metrics(config) if "l1" in row]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(ValueError, match="got a loss that is not finite at step [1-6], need a finite one: lower lr"):
        train_vq(dataclasses.replace(config, lr=1e30, clip_norm=1e30, warmup_steps=0))


def test_gradient_trained_code_book(config):
    train_vq(dataclasses.replace(config, steps=2, model=dataclasses.replace(TINY, ema=False)))
    assert all(np.isfinite(row["l1"]) for row in metrics(config) if "l1" in row)


def test_a_checkpoint_of_other_settings_is_refused(config):
    train_vq(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match=r"of a run with other settings \(lr, steps\), need the same settings to res"):
        train_vq(dataclasses.replace(config, steps=4, lr=0.5))


def test_a_finished_run_is_only_exported_again(config):
    result = train_vq(dataclasses.replace(config, steps=2))
    before = metrics(config)
    assert train_vq(dataclasses.replace(config, steps=2)) == result
    assert metrics(config) == before


def test_every_picture_once_an_epoch_whatever_the_batch_size():
    index = np.arange(10)
    order = _Order(index, seed=3)
    seen = np.concatenate([order.batch(step, 4) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert np.array_equal(_Order(index, seed=3).batch(4, 4), seen[16:])  # no history needed
    assert not np.array_equal(_Order(index, seed=4).batch(0, 4), seen[:4])


def test_augmentation_is_a_function_of_the_step(config):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(_augment(pixels, config, 3), _augment(pixels, config, 3))
    assert not np.array_equal(_augment(pixels, config, 3), _augment(pixels, config, 4))
    plain = dataclasses.replace(config, flip=False, shift=0)
    assert np.array_equal(_augment(pixels, plain, 3), pixels)
    mirrored = _augment(pixels, dataclasses.replace(config, shift=0), 3)
    same = [np.array_equal(a, b) for a, b in zip(mirrored, pixels, strict=True)]
    turned = [np.array_equal(a[:, ::-1], b) for a, b in zip(mirrored, pixels, strict=True)]
    assert all(a or b for a, b in zip(same, turned, strict=True)) and any(same) and any(turned)


def test_tar_members_that_lead_out_are_left_out_and_said(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", {"../../evil.png": png(0), "a.txt": b"no picture", "b.PNG": png(1)})
    assert [name for name, _ in read_pictures(tmp_path / "x.tar")] == ["b.PNG"]
    assert "evil.png left out: got" in (said := capsys.readouterr().out) and "need" in said
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def test_unreadable_pictures_are_reported(config, tmp_path, capsys):
    write_tar(tmp_path / "val.tar", {"good.png": png(0), "bad.png": png(1)[:60]})
    val = dataclasses.replace(config, val_paths=(tmp_path / "val.tar",), cache=tmp_path / "cache")
    _, held_out = collect(val, 16)
    assert held_out["val"].shape == (1, 16, 16, 3)
    assert "val-val: 1 pictures left out, first: got bad.png" in capsys.readouterr().out


def test_paths_that_are_no_pictures(config, tmp_path):
    with pytest.raises(ValueError, match="need a folder or a tar file of pictures: correct train_paths or val_paths"):
        train_vq(dataclasses.replace(config, train_paths=(tmp_path / "nowhere",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got no readable picture for empty-train"):
        train_vq(dataclasses.replace(config, train_paths=(tmp_path / "empty",)))
    with pytest.raises(ValueError, match="got no held-out pictures, need some to measure the tokenizer"):
        train_vq(dataclasses.replace(config, val_paths=()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"twemoji": 0, "openmoji": 0}, "got no pictures, need at least one source: set twemoji=1"),
        ({"steps": 0}, "got steps=0, need at least 1"),
        ({"precision": "fp8"}, "got precision=fp8 .*need bf16 or fp32"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TrainVqConfig(**options)


def test_conf_file_holds_the_defaults():
    assert compose("train_vq", []).config == TrainVqConfig()


def test_held_out_emoji_concepts_are_never_trained_on(monkeypatch, tmp_path):
    from moma import train_vq as module
    from moma.data.sources.split import concept_key, is_held_out

    names = [
        "lion",
        "lion face",
        "woman farmer",
        "man farmer dark skin tone",
        "pizza",
        "violin",
        "kiwi",
        "axe",
    ]
    held = {name for name in names if is_held_out(concept_key(name), 0.5)}
    assert held and held != set(names)
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i, _ in enumerate(names):
        (folder / f"{i}.png").write_bytes(png(i))
    listing = [(f"{i:x}", name, folder / f"{i}.png") for i, name in enumerate(names)]
    monkeypatch.setattr(module, "emoji_files", lambda config: listing if config == EmojiConfig("twemoji") else [])
    monkeypatch.setattr(module, "is_held_out", lambda key: is_held_out(key, 0.5))
    train, held_out = collect(TrainVqConfig(openmoji=0, cache=tmp_path / "cache", model=TINY), 16)
    assert len(train["twemoji"][0]) == len(names) - len(held) and len(held_out["twemoji"]) == len(held)


def test_sizes_take_turns_with_as_many_pixels_each(config):
    both = dataclasses.replace(config, sizes=(16, 32), batch_size=8, steps=4, eval_every=4)
    assert [both.pictures_of(size) for size in both.picture_sizes] == [8, 2]
    straight = train_vq(both)
    assert {name for name in straight if name.startswith("psnr")} == {"psnr/val@16", "psnr/val@32"}
    grid = Image.open(both.out / "grid.png")
    assert grid.size == (8 * 32, 4 * 32)  # a row of pairs of each size, equally large
    stopped = dataclasses.replace(both, out=config.out.with_name("stopped"))
    train_vq(stopped)
    shutil.rmtree(stopped.out / "checkpoints" / "step-00000004")
    assert train_vq(stopped) == straight


def test_an_asset_starts_a_run_with_a_larger_code_book(config):
    small = config.out.with_name("small")
    train_vq(dataclasses.replace(config, steps=2, export=small))
    larger = dataclasses.replace(TINY, n_embed=48)
    start = dataclasses.replace(config, steps=2, out=config.out.with_name("next"), init_from=small, model=larger)
    players = _players(start)
    old, new = load_vq(small).state_dict(), players.model.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old.keys() - {"quantize.embedding.weight"})
    book, copies = old["quantize.embedding.weight"], new["quantize.embedding.weight"].view(3, 16, -1)
    assert torch.equal(copies[0], book)
    assert 0 < (copies[1:] - book).abs().max() < 0.5 * book.std(0).max()
    torch.testing.assert_close(players.ema.totals / players.ema.counts[:, None], new["quantize.embedding.weight"])
    train_vq(start)
    with pytest.raises(ValueError, match=r"asset .* of another shape, need the model's but for n_embed"):
        _players(dataclasses.replace(start, model=dataclasses.replace(TINY, n_embed=24)))


@pytest.mark.parametrize("sizes", [(16, 9), (16, 128)])
def test_sizes_that_cannot_be_trained_are_refused(config, sizes):
    with pytest.raises(ValueError, match=r"got size \d+ in sizes, need multiples of 2 pixels"):
        dataclasses.replace(config, sizes=sizes)


# `-c TWO_PROCESSES PORT ARGUMENTS...`: one `moma` command as both ranks of a group, imported once
TWO_PROCESSES = """
import gc, os, sys
import moma.cli, moma.train_vq
gc.freeze()
port, *arguments = sys.argv[1:]
ranks = []
for rank in "01":
    ranks.append(os.fork())
    if ranks[-1] == 0:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
        os._exit(moma.cli.main(arguments))
sys.exit(any([os.waitpid(rank, 0)[1] for rank in ranks]))
"""


def test_two_processes_train_what_one_does(pictures, tmp_path):
    in_yaml = raw("train_vq", [])[0]["model"]

    def overrides(out):
        settings = {
            **{"out": out, "cache": tmp_path / "cache", "twemoji": 0, "openmoji": 0, "shift": 1, "threads": 1},
            **{"train_paths": [f"{pictures}/train"], "val_paths": [f"{pictures}/val.tar"], "steps": 4},
            **{f"model.{f.name}": getattr(TINY, f.name) for f in dataclasses.fields(VqConfig) if f.name in in_yaml},
            **{
                "quantize_start": 1,
                "batch_size": 8,
                "eval_every": 4,
                "checkpoint_every": 2,
                "log.interval": 1,
            },
            **{"perceptual_weight": 0, "discriminator_weight": 0.3, "discriminator_start": 1, "precision": "fp32"},
        }
        settings = {key: "null" if value is None else value for key, value in settings.items()}
        plain = str.maketrans("()", "[]", "' ")  # tuples and quotes as Hydra writes lists
        return [f"{key}={value}".translate(plain) for key, value in settings.items()]

    def written(out):
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    assert main(["train_vq", *overrides(tmp_path / "one")]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, port, "train_vq", *overrides(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert len(one) == len(two) and one[-1]["step"] == 4
    assert one[0] == pytest.approx(two[0], rel=1e-5)  # before any update: only the order of sums differs
    for a, b in zip(one[1:], two[1:], strict=True):  # Adam's first steps turn the rounding of small gradients into lr
        assert a == pytest.approx(b, rel=5e-3)


def test_pictures_that_cannot_be_shared_out_are_refused(config):
    with pytest.raises(ValueError, match="got 3 pictures of 16 px a step on 2 processes, need a multiple"):
        _run(dataclasses.replace(config, batch_size=3), Ranks(0, 2))
