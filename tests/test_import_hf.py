"""Imports: Meta's layout against Hugging Face's, memory, and the way on: upcycle, train, evaluate, generate."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moma import checkpoint, evaluate, generate, import_hf, train, upcycle
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.hf_chameleon import config_of, layout
from moma.model.attention import rotate, rotation
from moma.model.transformer import ModelConfig
from moma.objectives import NextTokenConfig, next_token
from moma.tokenizer.image import ImageTokenizer, to_tensor
from moma.tokenizer.text import TextTokenizer, byte_alphabet
from moma.tokenizer.vocab import load_vocabulary
from moma.vqgan.convert import to_hf_tensors, write_taming
from moma.vqgan.model import VqConfig, VqModel

MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=176, norm_order="swin", qk_norm="per_head", rope_theta=5e3
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("made"), pairs=60, texts=60)


def random_tensors(model, vocab, n_ranks=1, dtype=torch.float32, scale=0.3):
    """Tensors of a checkpoint by Hugging Face's names; heads of one rank share their QK-norms."""
    generator, found = torch.Generator().manual_seed(0), {}
    for part in layout(model, vocab.size).values():
        for name, shape in zip(part.names, part.shapes, strict=True):
            if part.how == "heads":
                one = torch.randn(n_ranks, shape[1], generator=generator)
                tensor = name.endswith("weight") + 0.3 * one.repeat_interleave(shape[0] // n_ranks, 0)
            else:
                tensor = ("norm" in name) + scale * torch.randn(shape, generator=generator)
            found[name] = tensor.to(dtype)
    return found


def write_hf(folder, model, vocab, tensors, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config_of(model, vocab, 128), **changes}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def imported(source, run_dir, tokenizer, *overrides):
    composed = compose("import_hf", [f"source={source}", f"tokenizer={tokenizer}", f"run_dir={run_dir}", *overrides])
    assert import_hf.main(composed) == 0
    return run_dir


def newest(run_dir):
    return checkpoint.latest(run_dir / "checkpoints")


def stored(run_dir):
    return checkpoint.read_tensors(newest(run_dir), "model")


def meta(run_dir):
    return checkpoint.read_meta(newest(run_dir))


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Meta's layout --------------------------------------------------------------------------------------------------


def neighbours(rows, n_heads):
    """Rows in the order of a model that rotates neighbours, from those of one that rotates halves."""
    size = len(rows) // n_heads
    turned = torch.empty_like(rows)
    for head in range(n_heads):
        for a in range(size // 2):
            turned[head * size + 2 * a] = rows[head * size + a]
            turned[head * size + 2 * a + 1] = rows[head * size + size // 2 + a]
    return turned


def write_meta(folder, model, tensors, n_ranks, **changes):
    """The same weights as Meta stores them, one file per rank."""
    folder.mkdir(parents=True)
    ranks = [{"rope.freqs": torch.ones(4)} for _ in range(n_ranks)]

    def put(name, parts):
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()

    put("tok_embeddings.weight", tensors["model.embed_tokens.weight"].chunk(n_ranks, 1))
    put("output.weight", tensors["lm_head.weight"].chunk(n_ranks, 0))
    put("norm.weight", [tensors["model.norm.weight"]] * n_ranks)
    for n in range(model.n_layers):
        hf, own = f"model.layers.{n}", f"layers.{n}"
        for name, heads in (("q", model.n_heads), ("k", model.kv_heads)):
            turned = neighbours(tensors[f"{hf}.self_attn.{name}_proj.weight"], heads)
            put(f"{own}.attention.w{name}.weight", turned.chunk(n_ranks))
            for leaf in ("weight", "bias"):
                firsts = tensors[f"{hf}.self_attn.{name}_norm.{leaf}"][:: heads // n_ranks]
                put(f"{own}.attention.{name}_normalization.{leaf}", [neighbours(row, 1) for row in firsts])
        put(f"{own}.attention.wv.weight", tensors[f"{hf}.self_attn.v_proj.weight"].chunk(n_ranks))
        put(f"{own}.attention.wo.weight", tensors[f"{hf}.self_attn.o_proj.weight"].chunk(n_ranks, 1))
        put(f"{own}.feed_forward.w1.weight", tensors[f"{hf}.mlp.gate_proj.weight"].chunk(n_ranks))
        put(f"{own}.feed_forward.w3.weight", tensors[f"{hf}.mlp.up_proj.weight"].chunk(n_ranks))
        put(f"{own}.feed_forward.w2.weight", tensors[f"{hf}.mlp.down_proj.weight"].chunk(n_ranks, 1))
        put(f"{own}.attention_norm.weight", [tensors[f"{hf}.input_layernorm.weight"]] * n_ranks)
        put(f"{own}.ffn_norm.weight", [tensors[f"{hf}.post_attention_layernorm.weight"]] * n_ranks)
    for number, rank in enumerate(ranks):
        torch.save(rank, folder / ("consolidated.pth" if n_ranks == 1 else f"consolidated.{number:02d}.pth"))
    nested = {
        "dim": model.dim, "n_layers": model.n_layers, "n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads,
        "multiple_of": 16, "norm_eps": model.norm_eps, "rope_theta": model.rope_theta, "qk_normalization": True,
        "swin_norm": model.norm_order == "swin", "vocab_size": -1, "model_parallel_size": 9,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps({"seed": 1, "dim": 3, "model": {**nested, **changes}}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": n_ranks}))
    return folder


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("order", ["pre", "swin"])
def test_metas_layout_gives_the_weights_of_hugging_faces(made, tmp_path, n_ranks, order):
    tokenizer, _, vocab = made
    model = replace(MODEL, norm_order=order)
    tensors = random_tensors(model, vocab, n_ranks, torch.bfloat16)
    hf = imported(write_hf(tmp_path / "hf", model, vocab, tensors), tmp_path / "a", tokenizer)
    ours = imported(write_meta(tmp_path / "meta", model, tensors, n_ranks), tmp_path / "b", tokenizer)
    same(stored(ours), stored(hf))
    for key in ("config", "precision", "vocab_hash"):
        assert meta(ours)[key] == meta(hf)[key]
    assert meta(ours)["config"]["model"]["qk_norm"] == ("shared" if n_ranks == 1 else "per_head")
    assert meta(ours)["imported"]["layout"] == "meta" and meta(ours)["imported"]["dtype"] == "bfloat16"


def test_widths_heads_and_a_missing_norm_are_read_as_metas_code_does(made, tmp_path):
    tokenizer, _, vocab = made
    model = replace(MODEL, hidden_dim=224, n_kv_heads=8, qk_norm="shared")
    tensors = random_tensors(model, vocab)
    folder = write_meta(tmp_path / "meta", model, tensors, 1, ffn_dim_multiplier=1.3, n_kv_heads=None)
    run = imported(folder, tmp_path / "run", tokenizer)
    assert meta(run)["config"]["model"]["hidden_dim"] == 224 and meta(run)["config"]["model"]["n_kv_heads"] == 8
    bare = {n: t for n, t in torch.load(folder / "consolidated.pth").items() if "normalization" not in n}
    torch.save(bare, folder / "consolidated.pth")
    (folder / "consolidate_params.json").unlink()
    edit(folder / "params.json", qk_normalization=False, model_parallel_size=1)
    run = imported(folder, tmp_path / "bare", tokenizer)
    assert meta(run)["config"]["model"]["qk_norm"] == "none" and not any("qk_norm" in name for name in stored(run))


def test_halves_rotate_as_neighbours_did():
    """The order of rows that the import makes, against RoPE as complex numbers."""
    size, theta, position = 8, 50.0, torch.arange(5)
    weight = torch.randn(2 * size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_LI = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = torch.view_as_complex((x_LI @ neighbours(weight, 2).T).view(5, 2, size // 2, 2))
    angle = position[:, None] * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None])
    turn = rotation(position[None], size, theta, torch.float64)
    ours = rotate((x_LI @ weight.T).view(1, 5, 2, size).transpose(1, 2), turn)[0].transpose(0, 1)
    torch.testing.assert_close(ours, torch.cat([turned[..., 0], turned[..., 1]], -1))


def test_copies_that_differ_give_their_mean(made, tmp_path):
    tokenizer, _, vocab = made
    folder = write_meta(tmp_path / "meta", MODEL, random_tensors(MODEL, vocab, 2), 2)
    second = torch.load(folder / "consolidated.01.pth")
    second["norm.weight"] += 1
    torch.save(second, folder / "consolidated.01.pth")
    run = imported(folder, tmp_path / "run", tokenizer)
    torch.testing.assert_close(stored(run)["norm.weight"], second["norm.weight"] - 0.5)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], **changes}}))


def resave(path, turn):
    loaded = torch.load(path)
    turn(loaded)
    torch.save(loaded, path)


SPOILT = {
    "a rank is missing": (
        lambda f: (f / "consolidated.01.pth").unlink(),
        "got consolidated.00.pth in .*, need 2 files for model_parallel_size=2: copy the whole checkpoint",
    ),
    "a number is missing": (
        lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"),
        "got consolidated.00.pth, consolidated.02.pth in .*, need 2 files for model_parallel_size=2",
    ),
    "no files": (
        lambda f: [path.unlink() for path in f.glob("*.pth")],
        "got no consolidated.pth in .*, need 2 files for model_parallel_size=2",
    ),
    "truncated": (
        lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:-100]),
        "got a damaged or very old .*consolidated.01.pth .*, need a whole file: copy it again",
    ),
    "harmful": (
        lambda f: torch.save({"norm.weight": Harmful()}, f / "consolidated.01.pth"),
        "consolidated.01.pth that holds more than tensors, need a plain state dict: it may be harmful, do not load it",
    ),
    "nested": (
        lambda f: torch.save({"model": {}}, f / "consolidated.01.pth"),
        "got .*consolidated.01.pth without tensors by name, need a plain state dict: give another checkpoint",
    ),
    "ranks differ": (
        lambda f: resave(f / "consolidated.01.pth", lambda t: t.update({"norm.weight": torch.ones(3)})),
        "got norm.weight in another form in consolidated.01.pth than in consolidated.00.pth, need ranks of one",
    ),
    "lacks": (
        lambda f: [resave(path, lambda t: t.pop("output.weight")) for path in f.glob("*.pth")],
        "got tokenizer=.* of 320 ids, need the checkpoint's -1: give the asset",
    ),
    "more": (
        lambda f: [resave(path, lambda t: t.update({"extra": torch.ones(3)})) for path in f.glob("*.pth")],
        "which also holds extra and 0 more tensors, need those of its configuration",
    ),
    "width": (
        lambda f: edit(f / "params.json", multiple_of=256),
        r"mlp.gate_proj.weight as \(176, 64\) in .*, need \(256, 64\): correct the configuration",
    ),
    "heads": (
        lambda f: edit(f / "params.json", n_kv_heads=1),
        "got 8 heads and 1 key heads on 2 ranks, need multiples: correct params.json",
    ),
    "a word": (
        lambda f: edit(f / "params.json", n_layers="two"),
        "got n_layers=two in the checkpoint's configuration, need a whole number from 1: correct it",
    ),
    "no object": (
        lambda f: (f / "params.json").write_text('{"model": 3}'),
        "got model=3 in .*params.json, need an object: copy the file again",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_meta_folder_is_refused_by_name(made, tmp_path, capsys, case):
    tokenizer, _, vocab = made
    folder = write_meta(tmp_path / "meta", MODEL, random_tensors(MODEL, vocab, 2), 2)
    spoil, text = SPOILT[case]
    spoil(folder)
    with pytest.raises(ValueError, match=text):
        imported(folder, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists() and "run" not in capsys.readouterr().out


# ---- memory and atomicity -------------------------------------------------------------------------------------------


def test_two_tensors_are_in_memory_at_a_time(tmp_path):
    made, most = [], []

    def fetch(n):
        memory = np.full(1000, n, np.float32)
        made.append(weakref.ref(memory))
        tensor = torch.from_numpy(memory)
        del memory
        most.append(sum(other() is not None for other in made))
        return tensor

    lazy = {f"model/{n}": checkpoint.Lazy((1000,), torch.float32, lambda n=n: fetch(n)) for n in range(12)}
    folder = checkpoint.save_lazily(tmp_path, 0, lazy, {"any": "thing"})
    assert max(most) <= 2 and len(most) == 12
    assert checkpoint.read_meta(folder)["any"] == "thing"
    same(checkpoint.read_tensors(folder, "model"), {str(n): torch.full((1000,), float(n)) for n in range(12)})
    opened = checkpoint.open_group(folder, "model")
    assert opened["3"].shape == (1000,) and torch.equal(opened["3"].fetch(), torch.full((1000,), 3.0))


def test_a_fetch_that_refuses_leaves_no_checkpoint(tmp_path):
    def refuse():
        raise ValueError("got a damaged file, need a whole one: copy it again")

    lazy = {"model/w": checkpoint.Lazy((2,), torch.float32, refuse)}
    with pytest.raises(ValueError, match="^got a damaged file, need a whole one: copy it again$"):
        checkpoint.save_lazily(tmp_path, 0, lazy, {})
    assert checkpoint.latest(tmp_path) is None
    good = {"model/w": checkpoint.Lazy((2,), torch.float32, lambda: torch.ones(2))}
    checkpoint.save_lazily(tmp_path, 0, good, {})
    with pytest.raises(ValueError, match="got a second checkpoint of step 0"):
        checkpoint.save_lazily(tmp_path, 0, good, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


PEAK = """
import resource, sys
from moma import cli
from moma import export_hf, import_hf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, tokenizer, run, out = sys.argv[1:]
assert cli.main(["import_hf", f"source={source}", f"tokenizer={tokenizer}", f"run_dir={run}"]) == 0
assert cli.main(["export_hf", f"run={run}", f"out={out}", "shard_bytes=16000000"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(made, tmp_path):
    """The peak of a process that takes 79 MB of bf16 (158 MB as fp32) in and out, over what it has before."""
    tokenizer, _, vocab = made
    model = ModelConfig(dim=256, n_layers=6, n_heads=4, n_kv_heads=4, hidden_dim=8192, qk_norm="per_head")
    folder, index = tmp_path / "hf", {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model, vocab, 128)))
    shards = {}
    for name, part in layout(model, vocab.size).items():
        shard = shards.setdefault(".".join(name.split(".")[:2]), {})
        shard |= {n: torch.full(shape, 0.5).bfloat16() for n, shape in zip(part.names, part.shapes, strict=True)}
    for name, shard in shards.items():
        save_file(shard, folder / f"{name}.safetensors", metadata={"format": "pt"})
        index |= {n: f"{name}.safetensors" for n in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert n_bytes > 75e6
    command = [sys.executable, "-c", PEAK, str(folder), str(tokenizer), str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 256 * 2 * 8192 * 4  # gate and up projection together, fp32
    assert int(done.stdout.splitlines()[-1]) * 1024 < 4 * largest < n_bytes
    out = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    same(out, {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()})


# ---- the way on -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pre", "swin"])
def seed(request, made, tmp_path_factory):
    """An imported dense run."""
    tokenizer, _, vocab = made
    model = replace(MODEL, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48, norm_order=request.param)
    folder = tmp_path_factory.mktemp("seed")
    tensors = random_tensors(model, vocab, scale=0.15)
    return imported(write_hf(folder / "hf", model, vocab, tensors), folder / "run", tokenizer)


DATA = ("data.rows=2", "data.row_length=64", "data.images=3")


def arguments(made, seed, run_dir, *overrides):
    tokenizer, corpus, _ = made
    model = [f"model.{key}={value}" for key, value in meta(seed)["config"]["model"].items()]
    return [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}", *DATA, *model, "optim.lr=1e-2",
        "log.interval=1", "eval.interval=null", "duration={steps:6}", *overrides,
    ]  # fmt: skip


def trained(made, seed, run_dir, *overrides):
    assert train.main(compose("train", arguments(made, seed, run_dir, *overrides))) == 0
    return run_dir


def upcycled(made, seed, run_dir, *overrides):
    composed = compose("upcycle", arguments(made, seed, run_dir, f"seed_run={seed}", "report_batches=2", *overrides))
    assert upcycle.main(composed) == 0
    return run_dir


def evaluated(run_dir, *overrides):
    assert evaluate.main(compose("evaluate", [f"run={run_dir}", "batches=2", *overrides])) == 0
    return json.loads((run_dir / "eval.json").read_text())["loss"]


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_an_import_is_upcycled_and_trained(made, seed, tmp_path, monkeypatch):
    run = upcycled(made, seed, tmp_path / "run", "feed_forward=moe_4t4i")
    start, record = meta(run), json.loads((run / "upcycle.json").read_text())
    assert start["step"] == 0 and start["data"] is None and start["precision"] == "fp32"
    assert (record["seed_step"], record["seed_tokens"], record["seed_flops"]) == (0, 0, 0)
    given = evaluated(seed, "data=emoji", f"data.corpus={made[1]}", *DATA)["causal"]
    for name, value in record["loss"]["seed"].items():
        assert given[name] == pytest.approx(value, abs=1e-5)
    for name, value in record["loss"]["upcycled"].items():
        assert evaluated(run)["train"][name] == pytest.approx(value, abs=1e-5)
    w13 = stored(seed)["blocks.1.feed_forward.experts.0.w13"][0]
    for group in (0, 1):
        assert all(torch.equal(one, w13) for one in stored(run)[f"blocks.1.feed_forward.experts.{group}.w13"])
    consumed = []

    def recorded(config, model, batch, *rest):
        consumed.append(batch.number)
        return next_token(config, model, batch, *rest)

    monkeypatch.setattr(train, "OBJECTIVES", {"next_token": (NextTokenConfig, recorded)})
    trained(made, seed, run, "feed_forward=moe_4t4i")
    assert consumed == [0, 1, 2, 3, 4, 5] and meta(run)["step"] == 6
    assert abs(losses(run)[0] - record["loss"]["upcycled"]["loss"]) < 1
    assert losses(run)[-1] < losses(run)[0]


def test_copies_whose_weights_sum_to_1_answer_like_the_import(made, seed, tmp_path):
    target = ("feed_forward=moe_8x_token_choice", "feed_forward.selection.weights=renormalised")
    run = upcycled(made, seed, tmp_path / "run", *target)
    record = json.loads((run / "upcycle.json").read_text())
    assert record["exact"] and record["max_logit_difference"] < 1e-3 and abs(record["loss"]["gap"]["loss"]) < 1e-4
    untied = upcycled(made, seed, tmp_path / "untied", "feed_forward=moe_1t1i", "attention=untied")
    assert json.loads((untied / "upcycle.json").read_text())["max_logit_difference"] < 1e-3


def test_dense_training_goes_on_from_an_import(made, seed, tmp_path):
    run = trained(made, seed, tmp_path / "run", "feed_forward=dense", f"init_from={seed}")
    given = evaluated(seed, "data=emoji", f"data.corpus={made[1]}", *DATA)["causal"]["loss"]
    assert abs(losses(run)[0] - given) < 1 and losses(run)[-1] < losses(run)[0]
    assert meta(run)["init_step"] == 0 and not torch.equal(stored(run)["head.weight"], stored(seed)["head.weight"])


def test_an_import_draws_and_names(made, seed, tmp_path):
    common = [f"run={seed}", "write=codes", "samples=2", "guidance=1.0"]
    assert generate.main(compose("generate", [*common, "prompts=[sun]", f"out={tmp_path}"])) == 0
    made_of = json.loads((tmp_path / "generations.json").read_text())
    assert made_of["mode"] == "causal" and made_of["step"] == 0 and len(made_of["generations"]) == 2
    with pytest.raises(ValueError, match="got .*run, an import without a corpus of its own, need a trained run for"):
        generate.main(compose("generate", [*common, "held_out=2", f"out={tmp_path}"]))


def test_what_an_import_cannot_be(made, seed, tmp_path):
    cases = [
        (lambda: upcycled(made, seed, tmp_path / "run", "optimizer=keep"), "got optimizer=keep and seed_run=.*import"),
        (lambda: upcycled(made, seed, tmp_path / "run", "model.dim=64"), "in more than feed_for.*model.dim: 32 -> 64"),
        (lambda: upcycled(made, seed, tmp_path / "run", "depth=mod"), "depth.kind: full -> mod"),
        (lambda: trained(made, seed, seed, "feed_forward=dense"), "got run_dir=.*, an import, which has nothing to"),
        (lambda: trained(made, seed, tmp_path / "run", f"init_from={seed}"), r"got init_from=.* of another model"),
        (lambda: evaluated(seed), "got .*run, an import without micro-batches of its own, need their shape and"),
    ]  # fmt: skip
    for act, text in cases:
        with pytest.raises(ValueError, match=text):
            act()
        assert not (tmp_path / "run").exists()
    own = trained(made, seed, tmp_path / "own", "feed_forward=dense")
    with pytest.raises(ValueError, match=r"got data=... for .*own, need the run's own micro-batches, which are part"):
        evaluated(own, "data=emoji")


def test_the_printed_settings_are_those_of_the_model(made, seed, tmp_path, capsys):
    tokenizer, _, vocab = made
    model = replace(MODEL, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48)
    folder = write_hf(tmp_path / "a folder", model, vocab, random_tensors(model, vocab))
    imported(folder, tmp_path / "a run", tokenizer, "qk_norm=per_head")
    settings = capsys.readouterr().out.splitlines()[-1].split()
    assert settings[0] == f"tokenizer={tokenizer}"
    composed = compose("train", [*settings, "feed_forward=dense"])
    assert composed.config.model == model
    default = compose("import_hf", [f"source={folder}", "tokenizer=x"]).config
    assert default.run_dir is None and default.qk_norm == "auto"


# ---- the tokenizer asset ----


def write_vocabulary_file(path, n_codes):
    """Chameleon's map in small: specials, codes by name, reserved names up to 64, the 256 bytes."""
    codes = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z" for code in range(n_codes)]
    names = ["<s>", "<pad>", "</s>", "<unk>", *codes, "<eoss>", "<racm3:break>"]
    names += [f"<reserved{id_ - 4:05}>" for id_ in range(len(names), 64)]
    added = [{"id": id_, "content": name, "special": True} for id_, name in enumerate(names)]
    added = [{**entry, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)} for entry in added]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    text = {chr_: 64 + i for i, chr_ in enumerate(byte_alphabet())}
    model = {"type": "BPE", "vocab": {**{name: i for i, name in enumerate(names)}, **text}, "merges": []}
    path.write_text(json.dumps({"added_tokens": added, "pre_tokenizer": byte_level, "model": model}))


SMALL_VQ = VqConfig(
    resolution=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=24, norm_groups=32
)


@pytest.fixture(params=["meta", "hf"])
def chameleon(request, made, tmp_path):
    """Folders of a checkpoint and of its tokenizer files, with pictures' weights that were drawn."""
    torch.manual_seed(0)
    pictures = VqModel(SMALL_VQ)
    if request.param == "meta":
        files = tmp_path / "tokenizer"
        files.mkdir()
        write_vocabulary_file(files / "text_tokenizer.json", 24)
        write_taming(pictures, files / "vqgan.ckpt", files / "vqgan.yaml")
    vocab = replace(made[2], size=64 + 256, image_start=4, image_stop=28, eoi=28, boi=29, text_start=64, text_stop=320)
    tensors, settings = to_hf_tensors(pictures)
    model = replace(MODEL, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48)
    own = random_tensors(model, vocab) | tensors
    folder = write_hf(tmp_path / "hf", model, vocab, own, vq_config=settings, vocabulary_map=None)
    if request.param == "hf":
        files = folder
        write_vocabulary_file(files / "tokenizer.json", 24)
    return folder, files, pictures


def test_the_asset_is_made_of_the_checkpoints_own_files(chameleon, tmp_path):
    folder, files, pictures = chameleon
    asset = tmp_path / "asset"
    run = imported(folder, tmp_path / "run", asset, f"tokenizer_files={files}")
    vocab = load_vocabulary(asset)
    assert (vocab.size, vocab.image_start, vocab.boi, vocab.eoi, vocab.image_grid) == (320, 4, 29, 28, (8, 8))
    assert meta(run)["config"]["vocab_hash"] == vocab.hash
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    tokenizer = ImageTokenizer.load(asset)
    x = to_tensor(pixels, preprocessing=tokenizer.model.config.preprocessing)
    assert np.array_equal(tokenizer.encode_pixels(pixels), pictures.encode(x).codes.flatten(1).numpy())
    text = TextTokenizer.load(asset, vocab)
    assert text.decode(text.encode("<s> a picture")) == "<s> a picture" and min(text.encode("<s>")) >= 64
    with pytest.raises(ValueError, match="already, need an empty place"):
        import_hf.make_asset(files, asset)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda files: [path.unlink() for path in files.glob("*tokenizer.json")],
            "with no vocabulary file, need text_",
        ),
        (
            lambda files: write_vocabulary_file(next(files.glob("*tokenizer.json")), 23),
            "got 23 image codes .* and 24 in",
        ),
    ],
)
def test_tokenizer_files_that_do_not_fit_are_refused(chameleon, tmp_path, spoil, text):
    _, files, _ = chameleon
    spoil(files)
    with pytest.raises(ValueError, match=text):
        import_hf.make_asset(files, tmp_path / "asset")
    assert not (tmp_path / "asset").exists()
