"""taming's files and transformers' models, read and written; transformers' own networks are the measure."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from moma.vqgan.convert import (
    MAX_YAML,
    from_hf_tensors,
    read_hf,
    read_taming,
    to_hf_tensors,
    write_taming,
)
from moma.vqgan.model import CHAMELEON, VqConfig, VqModel, load_vq, save_vq

TINY = VqConfig(
    resolution=32, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, embed_dim=8, n_embed=64, preprocessing="meta"
)
# In transformers' words: widths and levels, blocks, code size, attention at levels, none at all, a picture size.
HF_TINY = {
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 16,
    "embed_dim": 8,
    "num_embeddings": 64,
}
HF_CONFIGS = [
    {},
    {"base_channels": 64, "channel_multiplier": [1, 1, 2], "num_res_blocks": 2},
    {"latent_channels": 8, "embed_dim": 24, "num_embeddings": 100},
    {"channel_multiplier": [1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16, 8]},
    {"attn_type": "none", "attn_resolutions": [16]},
    {"resolution": 48, "channel_multiplier": [2, 1, 3], "attn_resolutions": [48]},
]


def randomize(model, seed=0):
    """Weights that keep the signal's size, so that codes differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 4:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            elif p.ndim == 1:
                p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
            else:
                p.normal_(0, 1, generator=generator)
    return model.eval()


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def peer(**changes):
    """transformers' network with random weights."""
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    configuration = pytest.importorskip("transformers.models.chameleon.configuration_chameleon")
    config = configuration.ChameleonVQVAEConfig(**HF_TINY | changes)
    return randomize(chameleon.ChameleonVQVAE(config)), config


def check_codes(codes, expected, z, book):
    """Equal, except where the two best distances (float64) lie within 1e-5 of each other."""
    distance = torch.cdist(z.double().permute(0, 2, 3, 1).flatten(0, 2), book.double()).square()
    near = distance.topk(2, largest=False)
    tie = near.values[:, 1] - near.values[:, 0] < 1e-5 * near.values[:, 0]
    differ = codes.flatten() != expected.flatten()
    assert not (differ & ~tie).any()
    assert ((expected.flatten()[:, None] == near.indices).any(1))[differ].all()


@pytest.mark.parametrize("changes", HF_CONFIGS, ids=str)
@torch.no_grad()
def test_same_features_and_codes_as_transformers(changes):
    theirs, config = peer(**changes)
    x = noise(2, 3, config.resolution, config.resolution)
    z = theirs.quant_conv(theirs.encoder(x))
    book, rows = theirs.quantize.embedding.weight, z.permute(0, 2, 3, 1).flatten(0, 2)
    book.mul_(0.3 * z.std()).add_(rows[torch.arange(len(book)) * 7 % len(rows)])  # all over what is to be coded
    ours = from_hf_tensors(theirs.state_dict(), config.to_dict())
    torch.testing.assert_close(ours.features(x), z, rtol=1e-5, atol=1e-5 * z.abs().max().item())
    result, expected = ours.encode(x), theirs.encode(x)
    check_codes(result.codes, expected.image_tokens, z, book)
    assert len(expected.image_tokens.unique()) > 30
    torch.testing.assert_close(result.loss, expected.embedding_loss, rtol=1e-4, atol=1e-6)


def test_chameleon_has_the_names_and_shapes_of_transformers():
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    configuration = pytest.importorskip("transformers.models.chameleon.configuration_chameleon")
    with torch.device("meta"):
        theirs = chameleon.ChameleonVQVAE(configuration.ChameleonVQVAEConfig()).state_dict()
        ours = VqModel(CHAMELEON).state_dict()
    encoding = {name: t.shape for name, t in ours.items() if not name.startswith("decoder.")}
    assert encoding == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize("blocks, multiplier", [(1, [1, 2]), (2, [1, 1, 2])])
@torch.no_grad()
def test_same_pictures_as_a_decoder_of_the_family_in_transformers(blocks, multiplier):
    """Janus has taming's decoder with attention at the coarsest level, levels numbered from there, and unit codes."""
    janus = pytest.importorskip("transformers.models.janus.modeling_janus")
    configuration = pytest.importorskip("transformers.models.janus.configuration_janus")
    levels, grid = len(multiplier), 8
    config = configuration.JanusVQVAEConfig(
        base_channels=32, channel_multiplier=multiplier, num_res_blocks=blocks, latent_channels=16, embed_dim=8,
        num_embeddings=64, num_patches=grid,
    )  # fmt: skip
    theirs = randomize(janus.JanusVQVAE(config))
    theirs.quantize.embedding.weight.div_(theirs.quantize.embedding.weight.norm(dim=1, keepdim=True))
    weights = {}
    for name, t in theirs.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(levels - 1 - int(parts[2]))
        weights[".".join(parts)] = t
    size = grid * 2 ** (levels - 1)
    settings = HF_TINY | {"num_res_blocks": blocks, "channel_multiplier": multiplier, "attn_resolutions": [grid]}
    ours = from_hf_tensors(weights, settings | {"resolution": size})
    assert ours.config.decoder and ours.config.attn_levels == (levels - 1,)
    x = noise(2, 3, size, size)
    z = theirs.quant_conv(theirs.encoder(x))
    torch.testing.assert_close(ours.features(x), z, rtol=1e-5, atol=1e-5 * z.abs().max().item())
    codes = torch.randint(64, (2, grid, grid), generator=torch.Generator().manual_seed(2))
    expected = theirs.decode(codes.flatten(1))
    assert expected.shape == (2, 3, size, size) and expected.std() > 0.1
    torch.testing.assert_close(ours.decode_codes(codes), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_folders_of_transformers(tmp_path):
    """The tokenizer alone in one file, and inside a Chameleon in many."""
    transformers = pytest.importorskip("transformers")
    letters = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(i))}Z": 4 + i for i in range(64)}
    config = transformers.ChameleonConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vq_config=HF_TINY, vocabulary_map={"<image>": 70, "</s>": 2, **letters},
    )  # fmt: skip
    whole = transformers.ChameleonForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    whole.model.vqmodel.save_pretrained(tmp_path / "alone")
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    expected = whole.model.vqmodel.state_dict()
    for folder in ("whole", "alone"):
        model = read_hf(tmp_path / folder)
        assert model.config == dataclasses.replace(TINY, decoder=False, preprocessing="hf")
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    # on as an asset: it encodes, and says why it cannot decode
    save_vq(model, tmp_path / "asset")
    asset = load_vq(tmp_path / "asset")
    codes = asset.encode(noise(1, 3, 32, 32)).codes
    with pytest.raises(ValueError, match="got an image tokenizer without a decoder.*take Chameleon's vqgan.ckpt"):
        asset.decode_codes(codes)


def test_to_transformers_and_back(tmp_path):
    config = dataclasses.replace(TINY, ch_mult=(1, 2, 2), attn_levels=(1, 2), decoder=False, preprocessing="hf")
    model = randomize(VqModel(config))
    tensors, settings = to_hf_tensors(model)
    assert all(name.startswith("model.vqmodel.") for name in tensors)
    again = from_hf_tensors(tensors, settings)
    assert again.config == config and not again.training
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    # transformers' own class takes them, all of them
    theirs, _ = peer(**settings)
    theirs.load_state_dict({name.removeprefix("model.vqmodel."): t for name, t in tensors.items()})
    torch.testing.assert_close(theirs.encode(x := noise(1, 3, 32, 32)).image_tokens, again.encode(x).codes.flatten())
    # and files without transformers
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": settings}))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in read_hf(tmp_path).state_dict().items())


def test_the_callers_tensors_stay_the_callers():
    tensors, settings = to_hf_tensors(VqModel(TINY))
    model = from_hf_tensors(tensors, settings)
    tensors["model.vqmodel.quant_conv.weight"].zero_()
    assert model.quant_conv.weight.any()


def test_a_decoder_is_left_out_for_transformers():
    tensors, _ = to_hf_tensors(VqModel(TINY))
    assert not any("decoder" in name for name in tensors) and "model.vqmodel.post_quant_conv.bias" in tensors


def test_other_norms_do_not_fit_others():
    model = VqModel(dataclasses.replace(TINY, norm_groups=4))
    text = r"got norms of 4 groups on widths \[32, 64\], need 32 groups and multiples of it for {}: keep moma's format"
    with pytest.raises(ValueError, match=text.format("transformers' model")):
        to_hf_tensors(model)
    with pytest.raises(ValueError, match=text.format("taming's files")):
        write_taming(model, Path("no.ckpt"), Path("no.yaml"))


# -- taming ----------------------------------------------------------------------------------------------------------


def taming_settings(**changes):
    """A YAML as published: the training's settings stand in it too."""
    ddconfig = {
        "double_z": False,
        "z_channels": 16,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    } | changes
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 100001}}
    params = {"embed_dim": 8, "n_embed": 64, "monitor": "val/rec_loss", "ddconfig": ddconfig, "lossconfig": loss}
    target = "taming.models.vqgan.VQModel"
    return {"model": {"base_learning_rate": 4.5e-06, "target": target, "params": params}, "lightning": {}}


@pytest.fixture
def files(tmp_path):
    """A model, and the paths of its checkpoint (with the loss's weights, as Lightning leaves them) and its YAML."""
    model = randomize(VqModel(TINY))
    weights = model.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"epoch": 3, "global_step": 7, "state_dict": weights}, tmp_path / "vqgan.ckpt")
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(taming_settings()))
    return model, tmp_path / "vqgan.ckpt", tmp_path / "vqgan.yaml"


def test_read_taming(files):
    model, checkpoint, settings = files
    again = read_taming(checkpoint, settings)
    assert again.config == TINY and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"attn_levels": (0, 1)}, {"mid_attention": False}], ids=str)
def test_to_taming_and_back(tmp_path, changes):
    model = randomize(VqModel(dataclasses.replace(TINY, **changes)))
    paths = tmp_path / "vqgan.ckpt", tmp_path / "vqgan.yaml"
    write_taming(model, *paths)
    again = read_taming(*paths)
    assert again.config == model.config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize("changes", [{"decoder": False}, {"decoder_ch": 64}, {"decoder_num_res_blocks": 0}], ids=str)
def test_taming_has_one_width_and_both_halves(tmp_path, changes):
    model = VqModel(dataclasses.replace(TINY, **changes))
    with pytest.raises(ValueError, match="got a tokenizer without a decoder or with one of its own widths, need one"):
        write_taming(model, tmp_path / "x.ckpt", tmp_path / "x.yaml")


def test_attention_at_the_levels_of_taming(files):
    """attn_resolutions are pixels a side of a level's maps: here level 1 of 32 pixels."""
    _, checkpoint, settings = files
    model = randomize(VqModel(dataclasses.replace(TINY, attn_levels=(1,))))
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    settings.write_text(yaml.safe_dump(taming_settings(attn_resolutions=[16, 7])))
    assert read_taming(checkpoint, settings).config.attn_levels == (1,)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"chanels": 3}, r"got the unknown key model.params.ddconfig.chanels, need a field of"),
        ({"double_z": True}, "got model.params.ddconfig.double_z=True, need one of False"),
        ({"resamp_with_conv": False}, "got model.params.ddconfig.resamp_with_conv=False, need one of True"),
        ({"attn_type": "linear"}, "got model.params.ddconfig.attn_type=linear, need one of vanilla, none"),
        ({"ch": "32"}, r"got model.params.ddconfig.ch='32' \(str\), need int"),
        ({"ch": -32}, "got sizes and widths .*, need one level or more and numbers from 1 to"),
        ({"resolution": 33}, "got resolution 33, need a multiple of 2"),
        ({"out_ch": 1}, "got 3 in_channels and 1 out_ch, need equal numbers: take a tokenizer of pictures"),
        ({"ch": 64}, r"got .*vqgan.ckpt with misshapen decoder.conv_in.bias of shape \(64,\), need \(128,\)"),
        (
            {"ch_mult": [1]},
            r"with the unknown decoder.up.0.block.0.nin_shortcut.bias of shape \(32,\), need none",
        ),
        (
            {"attn_resolutions": [16]},
            r"without decoder.up.1.attn.0.k.bias, need \(64,\) \(30 such\): give the settings",
        ),
        ({"num_res_blocks": 10**9}, "need those of 1000000000 blocks in each of 2 levels: give the settings and"),
    ],
    ids=str,
)
def test_settings_of_another_network(files, change, text):
    _, checkpoint, settings = files
    settings.write_text(yaml.safe_dump(taming_settings(**change)))
    with pytest.raises(ValueError, match=text):
        read_taming(checkpoint, settings)


def test_unknown_parameters_and_missing_ones(files):
    _, checkpoint, settings = files
    tree = taming_settings()
    tree["model"]["params"]["kl_weight"] = 1e-6
    settings.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="got the unknown key model.params.kl_weight, need a field of"):
        read_taming(checkpoint, settings)
    tree = taming_settings()
    del tree["model"]["params"]["n_embed"]
    settings.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="got no model.params.n_embed, need int: add model.params.n_embed=..."):
        read_taming(checkpoint, settings)
    tree = taming_settings()
    tree["model"]["params"] |= {"remap": "used.npy"}
    settings.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="got model.params.remap=used.npy, need one of None"):
        read_taming(checkpoint, settings)


@pytest.mark.parametrize("content", ["[1, 2]", "model: 3", "model: {base_learning_rate: 1}", "text", ""])
def test_yaml_without_parameters(files, content):
    _, checkpoint, settings = files
    settings.write_text(content)
    with pytest.raises(ValueError, match="got .*vqgan.yaml without model.params, need taming's settings there: give"):
        read_taming(checkpoint, settings)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"model: [", "got .*vqgan.yaml, which is not plain YAML .*need taming's settings: fetch it again"),
        (b"model: !!python/object/apply:os.system ['touch MARK']", "which is not plain YAML .*could not determine a"),
        (b"[" * 100_000, "which is not plain YAML"),
        (b"\xff\xfe\x00\x01", "got .*vqgan.yaml, which is not UTF-8 text, need settings: fetch it again"),
        (
            b"#" * (MAX_YAML + 1),
            f"got .*vqgan.yaml of {MAX_YAML + 1} bytes, need settings of at most {MAX_YAML}: check",
        ),
    ],
    ids=["cut", "code", "deep", "binary", "long"],
)
def test_bad_yaml(files, content, text, monkeypatch):
    _, checkpoint, settings = files
    monkeypatch.chdir(settings.parent)
    settings.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_taming(checkpoint, settings)
    assert not Path("MARK").exists()


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(files, protocol, bare):
    _, checkpoint, settings = files
    content = {"state_dict": {"encoder.conv_in.weight": _Hostile(checkpoint.parent / "MARK")}}
    if bare:
        checkpoint.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, checkpoint, pickle_protocol=protocol)
    text = (
        "which is damaged or holds more than tensors.*need a checkpoint of tensors alone, since anything else may run"
    )
    with pytest.raises(ValueError, match=text) as caught:
        read_taming(checkpoint, settings)
    assert "weights_only" not in str(caught.value) and not (checkpoint.parent / "MARK").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_checkpoint(files, keep):
    _, checkpoint, settings = files
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="got .*vqgan.ckpt, which is (no complete checkpoint|damaged).*fetch it again"):
        read_taming(checkpoint, settings)


def test_checkpoints_of_another_form(files):
    model, checkpoint, settings = files
    state = model.state_dict()
    for content, text in (
        (state, "got .*vqgan.ckpt without state_dict, need the weights under it: give taming's checkpoint"),
        ([1], "without state_dict"),
        (
            {"state_dict": state | {"note": "hello"}},
            "got 'note' in .*vqgan.ckpt, which is no tensor, need tensors alone",
        ),
        (
            {"state_dict": state | {"model_ema.decay": torch.zeros(())}},
            r"with the unknown model_ema.decay of shape \(\)",
        ),
        (
            {"state_dict": {name: t for name, t in state.items() if name != "decoder.conv_out.bias"}},
            r"without decoder.conv_out.bias, need \(3,\) \(1 such\): give the settings and weights of one model",
        ),
        (
            {"state_dict": state | {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int64)}},
            "got decoder.conv_out.bias as torch.int64 in .*, need plain floats: give the unpacked weights",
        ),
    ):
        torch.save({**content} if isinstance(content, dict) else content, checkpoint)
        with pytest.raises(ValueError, match=text):
            read_taming(checkpoint, settings)


def test_missing_files(files, tmp_path):
    _, checkpoint, settings = files
    with pytest.raises(ValueError, match="got no file .*no.ckpt, need taming's checkpoint: give its path"):
        read_taming(tmp_path / "no.ckpt", settings)
    with pytest.raises(ValueError, match="got no file .*no.yaml, need the tokenizer's settings: give the path to a"):
        read_taming(checkpoint, tmp_path / "no.yaml")
    with pytest.raises(ValueError, match="got no file .*config.json, need it: give the path to a complete"):
        read_hf(tmp_path)


# -- folders of transformers -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder of one safetensors file."""
    tensors, settings = to_hf_tensors(VqModel(TINY))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": settings}))
    return tmp_path


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "got .*config.json that is no JSON .*need a whole file: copy it again"),
        ("[]", "got .*config.json that holds a list, need an object: copy the file again"),
        ("{}", "got .*config.json without vq_config, need that of a Chameleon model or of its ChameleonVQVAE: give"),
        ('{"vq_config": 3}', "got .*config.json without vq_config"),
        ('{"vq_config": {"double_latent": true}}', "got vq_config.double_latent=True, need one of False"),
        ('{"vq_config": {"base_channels": "x"}}', r"got vq_config.base_channels='x' \(str\), need int"),
        ('{"vq_config": {}}', r"got .* without encoder.down.0.block.1.conv1.bias, need \(128,\)"),
    ],
)
def test_bad_config_of_transformers(folder, content, text):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        read_hf(folder)


def test_bad_weights_of_transformers(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ValueError, match="got .*model.safetensors, which is no complete safetensors file .*fetch it again"
    ):
        read_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="got no file .*model.safetensors, need the weights as safetensors: complete"):
        read_hf(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_shards_stay_in_their_folder(folder, shard):
    index = {"weight_map": {"model.vqmodel.encoder.conv_in.bias": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got shard .* in .*index.json, need plain file names: mend the index"):
        read_hf(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}'])
def test_an_index_without_names(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="got .*index.json without weight_map, need the file of each tensor: fetch"):
        read_hf(folder)


def test_tensors_of_another_network(folder):
    tensors, settings = to_hf_tensors(VqModel(TINY))
    with pytest.raises(
        ValueError, match=r"with misshapen quantize.embedding.weight of shape \(64, 8\), need \(65, 8\)"
    ):
        from_hf_tensors(tensors, settings | {"num_embeddings": 65})
    with pytest.raises(ValueError, match=r"got the tensors with the unknown extra of shape \(1,\), need none of this"):
        from_hf_tensors(tensors | {"model.vqmodel.extra": torch.zeros(1)}, settings)
    with pytest.raises(ValueError, match="without decoder.conv_in.bias"):
        from_hf_tensors(tensors | {"model.vqmodel.decoder.conv_out.bias": torch.zeros(3)}, settings)
