"""Weights of Chameleon in and out: transformers is the judge of the numbers, the bits judge the round trips."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma import checkpoint
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.evaluation.runs import load_run
from moma.export_hf import export_hf
from moma.hf_chameleon import check_vocabulary, layout, open_folder, vocabulary_map
from moma.import_hf import import_hf
from moma.modality import exact_groups
from moma.model.attention import document_mask
from moma.model.transformer import Architecture, ModelConfig, build_model
from moma.objectives import NextTokenConfig
from moma.schema import build, plain
from moma.vqgan.convert import read_hf

VQ = dict(
    num_embeddings=32, embed_dim=32, latent_channels=32, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
    resolution=4,
)  # fmt: skip
SIZES = {
    "pre, all heads": dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4),
    "pre, grouped": dict(hidden_size=48, intermediate_size=56, num_attention_heads=6, num_key_value_heads=2,
                         rms_norm_eps=1e-3, num_hidden_layers=3),
    "swin, all heads": dict(hidden_size=32, intermediate_size=40, num_attention_heads=2, num_key_value_heads=2,
                            swin_norm=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "swin, grouped": dict(hidden_size=64, intermediate_size=40, num_attention_heads=8, num_key_value_heads=4,
                          swin_norm=True, rms_norm_eps=1e-6, num_hidden_layers=1,
                          rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "swin, one key head": dict(hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                               swin_norm=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tokenizer, corpus, vocab = write_synthetic(tmp_path_factory.mktemp("made"), pairs=60, texts=60)
    return tokenizer, corpus, vocab


@pytest.fixture(scope="module")
def peer(made):
    """`peer(seed=0, dtype=float32, **fields of ChameleonConfig)`: transformers' model, every weight random."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vocab = made[2]

    def make(seed=0, dtype=torch.float32, **fields):
        fields = {"num_hidden_layers": 2, "vocab_size": vocab.size, **SIZES["pre, grouped"], **fields}
        config = ChameleonConfig(vq_config=VQ, vocabulary_map=vocabulary_map(vocab), **fields)
        model = ChameleonForConditionalGeneration(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.3 if parameter.ndim > 1 and "norm" not in name else 0.4
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
        return model.to(dtype)

    return make


@pytest.fixture
def saved(peer, tmp_path):
    """A folder of such a model, in three shards, bf16."""
    folder = tmp_path / "hf"
    peer(dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
    return folder


def imported(source, run_dir, made, *overrides):
    composed = compose("import_hf", [f"source={source}", f"tokenizer={made[0]}", f"run_dir={run_dir}", *overrides])
    import_hf(composed.config, run_dir)
    return run_dir


def exported(run_dir, out, *overrides):
    export_hf(compose("export_hf", [f"run={run_dir}", f"out={out}", *overrides]).config)
    return out


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def stored(run_dir):
    return checkpoint.read_tensors(checkpoint.latest(run_dir / "checkpoints"), "model")


def meta(run_dir):
    return checkpoint.read_meta(checkpoint.latest(run_dir / "checkpoints"))


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def logits_of(run_dir, ids_RL):
    run = load_run(run_dir, "cpu")
    groups = exact_groups(ids_RL, run.vocab)
    position_RL = torch.arange(ids_RL.shape[1]).expand(ids_RL.shape)
    with torch.no_grad():
        hidden_RLD, _ = run.model(ids_RL, position_RL, document_mask(torch.zeros_like(ids_RL)), groups)
        return run.model.head(hidden_RLD)


def agree(run_dir, model, vocab, atol):
    """Our logits are transformers' before its mask of image codes, and as near as its own to those of its float64
    model; and the mask is where we say it is."""
    ids_RL = torch.randint(vocab.size, (2, 24), generator=torch.Generator().manual_seed(1))
    ours_RLV = logits_of(run_dir, ids_RL)
    with torch.no_grad():
        theirs_RLV = model.lm_head(model.model(input_ids=ids_RL).last_hidden_state)
        masked_RLV = model(input_ids=ids_RL).logits
        wide = copy.deepcopy(model).double()
        exact_RLV = wide.lm_head(wide.model(input_ids=ids_RL).last_hidden_state)
    assert theirs_RLV.std() > 0.5
    ours, theirs = ((x_RLV - exact_RLV).abs().max() for x_RLV in (ours_RLV, theirs_RLV))
    assert ours <= max(atol, 2 * theirs)
    image = slice(vocab.image_start, vocab.image_stop)
    assert (masked_RLV[..., image] == torch.finfo(torch.float32).min).all()
    text = [i for i in range(vocab.size) if not vocab.image_start <= i < vocab.image_stop]
    assert torch.equal(masked_RLV[..., text], theirs_RLV[..., text])


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SIZES)
def test_an_imported_model_answers_as_transformers_does(peer, made, tmp_path, case):
    model = peer(**SIZES[case])
    model.save_pretrained(tmp_path / "hf")
    run = imported(tmp_path / "hf", tmp_path / "run", made)
    assert meta(run)["config"]["model"]["norm_order"] == case.split(",")[0]
    agree(run, model, made[2], 1e-5)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("qk_norm", ["shared", "per_head"])
def test_transformers_answers_as_an_exported_model_does(made, tmp_path, case, qk_norm):
    from transformers import ChameleonForConditionalGeneration

    tokenizer, _, vocab = made
    fields = SIZES[case]
    model = ModelConfig(
        dim=fields["hidden_size"], n_layers=2, n_heads=fields["num_attention_heads"],
        n_kv_heads=fields["num_key_value_heads"], norm_order=case.split(",")[0],
        norm_eps=fields.get("rms_norm_eps", 1e-5), qk_norm=qk_norm, rope_theta=77.0,
    )  # fmt: skip
    run = own_run(tmp_path / "run", model, tokenizer, vocab)
    folder = exported(run, tmp_path / "hf")
    peer, found = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert all(name.startswith("model.vqmodel.") for name in found["missing_keys"])
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    assert peer.config.rope_parameters["rope_theta"] == 77.0 and peer.dtype == torch.float32
    agree(run, peer.eval(), vocab, 1e-5)
    again = imported(folder, tmp_path / "again", made, f"qk_norm={qk_norm}")
    same_bits(stored(again), stored(run))
    assert meta(again)["config"]["model"] == plain(replace(model, hidden_dim=model.ffn_dim))


def own_run(run_dir, model, tokenizer, vocab, **settings):
    """A run folder of a random model, as far as loading and exporting read it."""
    architecture = Architecture(model)
    ours = build_model(architecture, vocab.size, vocab.modalities, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    config = {**plain(architecture), "objective": plain(NextTokenConfig()), "tokenizer": str(tokenizer), **settings}
    record = {"config": config, "vocab_hash": vocab.hash, "precision": "fp32"}
    checkpoint.save(run_dir / "checkpoints", 0, {"model": checkpoint.model_state(ours)}, record, 1)
    return run_dir


# ---- the bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_came_in_comes_out_bit_for_bit(peer, made, tmp_path, dtype):
    folder = tmp_path / "hf"
    peer(dtype=dtype).save_pretrained(folder, max_shard_size="150KB")
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    run = imported(folder, tmp_path / "run", made)
    assert all(tensor.dtype == torch.float32 for tensor in stored(run).values())
    assert meta(run)["precision"] == ("fp32" if dtype == torch.float32 else "bf16")
    out = exported(run, tmp_path / "out", "shard_bytes=100000")
    same_bits(tensors(out), tensors(folder))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 100_000 + 8_000 for path in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())
    same_bits({n: load_file(out / file)[n] for n, file in index["weight_map"].items()}, tensors(folder))
    whole = exported(run, tmp_path / "whole")
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    same_bits(tensors(whole), tensors(folder))
    again = imported(whole, tmp_path / "again", made)
    same_bits(stored(again), stored(run))


def test_the_picture_tokenizer_waits_beside_the_run(saved, made, tmp_path):
    run = imported(saved, tmp_path / "run", made)
    pictures = {name: t for name, t in tensors(saved).items() if name.startswith("model.vqmodel.")}
    assert len(pictures) > 20
    same_bits(tensors(run / "hf"), pictures)
    ours = read_hf(run / "hf").state_dict()
    assert torch.equal(ours["quantize.embedding.weight"], pictures["model.vqmodel.quantize.embedding.weight"].float())


@pytest.mark.parametrize(("overrides", "dtype"), [([], "float32"), (["dtype=bf16"], "bfloat16")])
def test_a_run_that_was_trained_on_takes_along_what_its_import_had(saved, made, tmp_path, overrides, dtype):
    from transformers import ChameleonForConditionalGeneration

    tokenizer, _, vocab = made
    first = imported(saved, tmp_path / "first", made)
    model = build(ModelConfig, meta(first)["config"]["model"])
    run = own_run(tmp_path / "run", model, tokenizer, vocab)
    out = exported(run, tmp_path / "out", f"like={first}", *overrides)
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (out, saved))
    assert config == {**source, "dtype": dtype}
    found, before = tensors(out), tensors(saved)
    assert found.keys() == before.keys()
    pictures = {name for name in before if name.startswith("model.vqmodel.")}
    same_bits({name: found[name] for name in pictures}, {name: before[name] for name in pictures})
    assert {str(t.dtype) for name, t in found.items() if name not in pictures} == {f"torch.{dtype}"}
    peer = ChameleonForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    agree(run, peer, vocab, 1e-5 if dtype == "float32" else 0.1)


def test_the_run_says_how_far_a_model_without_an_import_reads(made, tmp_path):
    tokenizer, _, vocab = made
    run = own_run(
        tmp_path / "run", ModelConfig(dim=16, n_layers=1, n_heads=2), tokenizer, vocab, data={"row_length": 99}
    )
    config = json.loads((exported(run, tmp_path / "out") / "config.json").read_text())
    assert config["max_position_embeddings"] == 99 and config["vocabulary_map"]["<racm3:break>"] == vocab.boi


def test_tensors_of_several_dtypes_keep_theirs(saved, made, tmp_path):
    mixed = tensors(saved)
    mixed = {name: t.float() if "norm" in name else t for name, t in mixed.items()}
    for path in saved.glob("model*"):
        path.unlink()
    save_file(mixed, saved / "model.safetensors", metadata={"format": "pt"})
    run = imported(saved, tmp_path / "run", made)
    record = meta(run)["imported"]
    assert record["dtype"] == "float32" or all("norm" in name for name in record["other_dtypes"])
    same_bits(tensors(exported(run, tmp_path / "out")), mixed)


def test_the_heads_of_a_layer_share_a_norm_where_their_bits_are_the_same(peer, made, tmp_path):
    model = peer()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.copy_(norm.weight[:1].expand_as(norm.weight))
                norm.bias.copy_(norm.bias[:1].expand_as(norm.bias))
    model.save_pretrained(tmp_path / "hf")
    run = imported(tmp_path / "hf", tmp_path / "run", made)
    assert meta(run)["config"]["model"]["qk_norm"] == "shared"
    assert stored(run)["blocks.0.attention.qk_norm.k_weight"].shape == (1, 1, 8)
    agree(run, model, made[2], 1e-5)
    same_bits(tensors(exported(run, tmp_path / "out")), tensors(tmp_path / "hf"))
    apart = imported(tmp_path / "hf", tmp_path / "apart", made, "qk_norm=per_head")
    assert stored(apart)["blocks.0.attention.qk_norm.k_weight"].shape == (2, 1, 8)
    agree(apart, model, made[2], 1e-5)


def test_the_names_of_the_layout_are_transformers_own(peer, made):
    model = ModelConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=56, qk_norm="per_head")
    wanted = {n: s for p in layout(model, made[2].size).values() for n, s in zip(p.names, p.shapes, strict=True)}
    theirs = {n: tuple(t.shape) for n, t in peer().state_dict().items() if not n.startswith("model.vqmodel.")}
    assert wanted == theirs
    ours = build_model(Architecture(model), made[2].size, seed=0).state_dict()
    assert {n: p.own for n, p in layout(model, made[2].size).items()} == {n: tuple(t.shape) for n, t in ours.items()}


# ---- refusals -------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "got config.json of model_type=llama, need chameleon: give another checkpoint"),
        ({"hidden_act": "gelu"}, "got hidden_act=gelu in config.json, need silu: our decoder has no other"),
        ({"attention_bias": True}, "got attention_bias=True in config.json, need False"),
        ({"mlp_bias": True}, "got mlp_bias=True in config.json, need False"),
        ({"tie_word_embeddings": True}, "got tie_word_embeddings=True in config.json, need False"),
        ({"rope_scaling": {"type": "linear"}}, r"got rope_scaling=\{'type': 'linear'\} in config.json, need None"),
        ({"quantization_config": {"bits": 4}}, "got quantization_config=.* need None: our decoder has no other"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "got rope_type=yarn in config.json, need default"),
        ({"head_dim": 9}, "got head_dim=9 in config.json, need hidden_size / num_attention_heads = 8"),
        ({"hidden_size": "48"}, "got hidden_size=48 in the checkpoint's configuration, need a whole number from 1"),
        ({"num_key_value_heads": None}, "got num_key_value_heads=None in the checkpoint's configuration, need a whole"),
        ({"rms_norm_eps": -1}, "got rms_norm_eps=-1 in the checkpoint's configuration, need a positive number"),
        ({"num_attention_heads": 5}, "got dim=48 and n_heads=5, need an even dim / n_heads"),
        ({"num_hidden_layers": 4}, "which lacks model.layers.3.input_layernorm.weight and 12 more tensors, need those"),
        ({"num_hidden_layers": 2}, "which also holds model.layers.2.input_layernorm.weight and 12 more tensors"),
        ({"intermediate_size": 64}, r"mlp.gate_proj.weight as \(56, 48\) in .*, need \(64, 48\): correct the config"),
        ({"vocab_size": 99}, "got tokenizer=.* of 320 ids, need the checkpoint's 99: give the asset it was trained"),
        ({"vocabulary_map": {"<s>": 7}}, "got tokenizer=.* where <s> is 0, need the checkpoint's 7"),
        ({"vocabulary_map": {"IMGIMGAZ": 4}}, "got tokenizer=.* of 32 image codes, need the checkpoint's 1"),
        ({"vocabulary_map": [1]}, r"got vocabulary_map=\[1\] in config.json, need an object"),
    ],
)  # fmt: skip
def test_a_configuration_without_a_counterpart_is_refused(saved, made, tmp_path, changes, text):
    edit(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=text):
        imported(saved, tmp_path / "run", made)
    assert not (tmp_path / "run").exists()


def truncate(folder):
    path = next(folder.glob("*-00002-*"))
    path.write_bytes(path.read_bytes()[:-1])


def point_outside(folder):
    path = folder / "model.safetensors.index.json"
    edit(path, weight_map={**json.loads(path.read_text())["weight_map"], "lm_head.weight": "../other.safetensors"})


def misplace(folder):
    path = folder / "model.safetensors.index.json"
    weights = json.loads(path.read_text())["weight_map"]
    weights["lm_head.weight"] = next(file for file in weights.values() if file != weights["lm_head.weight"])
    edit(path, weight_map=weights)


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def change(folder, turn):
    found = tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    turn(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (truncate, "got a damaged or missing .*-00002-of-.*need a whole file: copy it again"),
        (lambda f: next(f.glob("*-00001-*")).unlink(), "got a damaged or missing .*-00001-of-.*: copy it again"),
        (point_outside, r"puts lm_head.weight into '../other.safetensors', need a .safetensors file in the same"),
        (misplace, "index.json that is wrong about lm_head.weight and 0 more tensors, need the index of these files"),
        (only_pickles, "got pytorch_model.bin, a pickle, in .*, need safetensors: save the checkpoint anew with"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "got no model.safetensors in .*, need safetensors"),
        (lambda f: (f / "config.json").unlink(), "with no config.json, need a folder with config.json .Hugging Face"),
        (lambda f: (f / "params.json").write_text("{}"), "with config.json and params.json, need a folder with"),
        (lambda f: (f / "config.json").write_text("{"), "config.json that is no JSON .*, need a whole file"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json that holds a list, need an object"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "index.json without a weight_map, need a whole file: copy it again",
        ),
        (lambda f: change(f, lambda t: t.pop("lm_head.weight")), "which lacks lm_head.weight and 0 more tensors"),
        (
            lambda f: change(f, lambda t: t.update({"model.extra": torch.ones(2)})),
            "which also holds model.extra and 0 more tensors, need those of its configuration",
        ),
        (
            lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.float64)})),
            "got model.norm.weight as float64 in .*, need float32, float16, bfloat16: convert it",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(saved, made, tmp_path, spoil, text):
    spoil(saved)
    with pytest.raises(ValueError, match=text):
        imported(saved, tmp_path / "run", made)
    assert not (tmp_path / "run").exists()


def test_a_tensor_in_two_files_is_refused(saved):
    save_file({"lm_head.weight": torch.ones(2)}, saved / "extra.safetensors")
    index = saved / "model.safetensors.index.json"
    edit(index, weight_map={**json.loads(index.read_text())["weight_map"], "more": "extra.safetensors"})
    with pytest.raises(ValueError, match="got lm_head.weight in .* and in .*, need it once"):
        open_folder(saved)


def test_a_norm_cannot_be_shared_by_heads_that_differ(saved, made, tmp_path):
    with pytest.raises(ValueError, match="got qk_norm=shared and heads that differ in .*q_norm.weight, need per_head"):
        imported(saved, tmp_path / "run", made, "qk_norm=shared")


def test_a_run_folder_with_a_checkpoint_is_refused(saved, made, tmp_path):
    run = imported(saved, tmp_path / "run", made)
    with pytest.raises(ValueError, match="got a checkpoint in .*run, need a new run folder: set another run_dir"):
        imported(saved, run, made)


def test_a_source_is_not_overwritten(saved, made, tmp_path):
    assert saved == tmp_path / "hf"
    before = tensors(saved)
    with pytest.raises(ValueError, match="got run_dir=.*, which would overwrite .*hf, need another folder"):
        imported(saved, tmp_path, made)
    same_bits(tensors(saved), before)


def test_an_import_that_was_stopped_is_made_by_the_same_command(saved, made, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "dcp_save", killed)
        imported(saved, run, made)
    assert checkpoint.latest(run / "checkpoints") is None
    (run / "hf" / "mine").write_text("kept")
    (saved / "generation_config.json").unlink()
    imported(saved, run, made)
    assert (run / "hf" / "mine").exists() and not (run / "hf" / "generation_config.json").exists()
    same_bits(tensors(exported(run, tmp_path / "out")), tensors(saved))


def test_a_big_small_file_is_refused(saved, made, tmp_path, monkeypatch):
    monkeypatch.setattr("moma.hf_chameleon.MAX_JSON", 10_000)
    (saved / "tokenizer.json").write_bytes(bytes(10_001))
    with pytest.raises(ValueError, match="got .*tokenizer.json of more than 10000 bytes, need a small file"):
        imported(saved, tmp_path / "run", made)
    assert not (tmp_path / "run").exists()


def test_what_export_refuses(saved, made, tmp_path):
    tokenizer, _, vocab = made
    run = imported(saved, tmp_path / "run", made)
    small = dict(dim=16, n_layers=1, n_heads=2)
    own = own_run(tmp_path / "own", ModelConfig(**small), tokenizer, vocab)
    cases = [
        ([tmp_path / "nowhere", tmp_path / "out"], "got run=.*nowhere without a checkpoint, need a trained or import"),
        ([run, saved], "got out=.*hf, which is there already, need a new folder"),
        ([run, tmp_path / "out", "shard_bytes=20"], "got shard_bytes=20, need at least the 30720 of model.embed_t"),
        ([run, tmp_path / "out", f"like={own}"], "got like=.*own, which is no import of a Hugging Face folder, need"),
        ([own, tmp_path / "out", f"like={run}"], "got .*config.json of ModelConfig.*, need that of .*correct like"),
        ([own_run(tmp_path / "none", ModelConfig(**small, qk_norm="none"), tokenizer, vocab), tmp_path / "out"],
         "got a run with another model.qk_norm, need model.qk_norm=shared or per_head: Chameleon has no tensors"),
    ]  # fmt: skip
    for (folder, out, *rest), text in cases:
        with pytest.raises(ValueError, match=text):
            exported(folder, out, *rest)
        assert not (tmp_path / "out").exists()


def test_an_export_that_was_stopped_leaves_no_folder(saved, made, tmp_path, monkeypatch):
    run = imported(saved, tmp_path / "run", made)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moma.hf_chameleon.write_file", killed)
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same_bits(tensors(exported(run, tmp_path / "out")), tensors(saved))


def test_the_map_names_every_id_once(made):
    vocab = made[2]
    names = vocabulary_map(vocab)
    assert len(set(names.values())) == len(names)
    assert names["IMGIMGDBZ"] == vocab.image_start + 31 and names["<eoss>"] == vocab.eoi and names["</s>"] == vocab.eos
    assert names["<image>"] == vocab.boi + 1
    check_vocabulary({"vocab_size": vocab.size, "vocabulary_map": names}, vocab, "x")
