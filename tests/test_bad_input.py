"""What a user can get wrong, through the command line: one line, exit code 2, nothing half-written."""

import shutil

import pytest

from moma import cli
from moma.data.synthetic import write_synthetic


@pytest.fixture
def made(tmp_path):
    tokenizer, corpus, _ = write_synthetic(tmp_path / "made", pairs=20, texts=20)
    return tokenizer, corpus


def train(made, run_dir, *overrides):
    tokenizer, corpus = made
    return cli.main([
        "train", f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}", "data.rows=2",
        "data.row_length=64", "data.images=3", "model.dim=32", "model.n_layers=1", "model.n_heads=2",
        "precision=fp32", "duration.tokens=256", "eval.interval=null", *overrides,
    ])  # fmt: skip


def refused(capsys, tmp_path, status, words):
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lr_=1"], ["got the unknown key optim.lr_", "did you mean optim.lr?"]),
        (["feed_forward=moe_4t4"], ["got feed_forward=moe_4t4, need one of", "did you mean moe_4t4i?"]),
        (["data.images=9"], ["got images=9 per micro-batch, need at most 4", "set data.images<=4"]),
        (["model.dim=33"], ["got dim=33 and n_heads=2, need an even dim / n_heads"]),
        (["feed_forward=dense", "+feed_forward.experts.text=4"], ["unknown key feed_forward.experts"]),
        (["optim.warmupp.steps=3"], ["got the unknown duration optim.warmupp", "did you mean optim.warmup?"]),
        (["optim.lr=fast"], ["got optim.lr='fast' (str), need float"]),
    ],
)
def test_configuration(made, tmp_path, capsys, overrides, words):
    refused(capsys, tmp_path, train(made, tmp_path / "run", *overrides), words)


def test_truncated_shard(made, tmp_path, capsys):
    shard = next((made[1] / "train" / "pair").glob("*.tokens.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(capsys, tmp_path, train(made, tmp_path / "run"), ["got", str(shard.name), "need"])


def test_corpus_of_another_tokenizer(made, tmp_path, capsys):
    other, _, _ = write_synthetic(tmp_path / "other", pairs=4, texts=4, image_codes=64)
    status = train((other, made[1]), tmp_path / "run")
    refused(capsys, tmp_path, status, ["got", "of tokenizer", "need the run's tokenizer with hash", "prepare it again"])


def test_checkpoint_of_another_tokenizer(made, tmp_path, capsys):
    assert train(made, tmp_path / "first") == 0
    capsys.readouterr()
    other, _, _ = write_synthetic(tmp_path / "other", pairs=4, texts=4, image_codes=64)
    shutil.rmtree(made[0])
    shutil.copytree(other, made[0])
    status = cli.main(["evaluate", f"run={tmp_path / 'first'}"])
    refused(capsys, tmp_path, status, ["got tokenizer", "need the one", "restore that tokenizer, or train again"])


def test_an_image_that_is_not_one(tmp_path, capsys):
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"not a picture")
    from moma.tokenizer.image import open_image

    with pytest.raises(ValueError, match=r"cat.png.*need") as raised:
        open_image(picture.read_bytes(), str(picture))
    assert "\n" not in str(raised.value)
