import dataclasses
import json
import re

import pytest
import torch

from moma.vqgan.model import CHAMELEON, VqConfig, VqModel, load_vq, save_vq

TINY = VqConfig(resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16, ema=True)


@pytest.fixture(scope="module")
def chameleon():
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in VqModel(CHAMELEON).state_dict().items()}


# Representative names and shapes of a taming VQModel with Chameleon's settings.
CHAMELEON_SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.0.norm1.weight": (128,),
    "encoder.down.0.block.1.conv2.bias": (128,),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.down.1.block.0.conv1.weight": (128, 128, 3, 3),
    "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.3.downsample.conv.bias": (256,),
    "encoder.down.4.block.0.nin_shortcut.bias": (512,),
    "encoder.down.4.block.1.conv1.weight": (512, 512, 3, 3),
    "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.norm.weight": (512,),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.proj_out.bias": (512,),
    "encoder.mid.block_2.norm2.bias": (512,),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (256, 512, 3, 3),
    "quant_conv.weight": (256, 256, 1, 1),
    "quantize.embedding.weight": (8192, 256),
    "post_quant_conv.bias": (256,),
    "decoder.conv_in.weight": (512, 256, 3, 3),
    "decoder.mid.attn_1.v.weight": (512, 512, 1, 1),
    "decoder.up.4.block.2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
    "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.1.upsample.conv.bias": (128,),
    "decoder.up.0.block.2.norm1.weight": (128,),
    "decoder.norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}


@pytest.mark.parametrize("name", CHAMELEON_SHAPES)
def test_chameleon_parameter(chameleon, name):
    assert chameleon[name] == CHAMELEON_SHAPES[name]


def test_chameleon_counts(chameleon):
    # Blocks: 8 tensors, 2 more where the width changes; attention: 10. Encoder: 5 levels of 2 blocks, 2
    # of them widening, 4 downsamplings, mid and ends. Decoder: the same with 3 blocks a level.
    parts = ("encoder", "decoder", "quantize")
    per_part = {part: sum(name.startswith(part + ".") for name in chameleon) for part in parts}
    mid_and_ends = 2 * 8 + 10 + 3 * 2
    assert per_part == {
        "encoder": 10 * 8 + 2 * 2 + 4 * 2 + mid_and_ends,
        "decoder": 15 * 8 + 2 * 2 + 4 * 2 + mid_and_ends,
        "quantize": 1,
    }
    assert len(chameleon) == sum(per_part.values()) + 4
    known = re.compile(
        r"(encoder\.down|decoder\.up)\.[0-4]\.(block\.[0-2]\.(norm[12]|conv[12]|nin_shortcut)|"
        r"(down|up)sample\.conv)\.|(encoder|decoder)\.(conv_in|norm_out|conv_out)\.|"
        r"(encoder|decoder)\.mid\.(block_[12]\.(norm|conv)[12]|attn_1\.(norm|q|k|v|proj_out))\.|"
        r"quantize\.embedding\.|(post_)?quant_conv\."
    )
    assert [name for name in chameleon if not known.match(name)] == []


def test_chameleon_grid_and_shapes():
    assert CHAMELEON.factor == 16 and CHAMELEON.grid == (32, 32)
    with torch.device("meta"):
        model, x = VqModel(CHAMELEON), torch.empty(1, 3, 512, 512)
        z = model.features(x)
        assert z.shape == (1, 256, 32, 32)
        assert model.decode(z).shape == (1, 3, 512, 512)


@pytest.mark.parametrize("groups, counts", [(32, {(8, 24), (16, 48), (32, 96)}), (4, {(4, 24), (4, 48), (4, 96)})])
def test_number_of_norm_groups(groups, counts):
    config = VqConfig(
        resolution=16, ch=24, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16,
        norm_groups=groups,
    )  # fmt: skip
    norms = [m for m in VqModel(config).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.num_channels) for m in norms} == counts
    assert {m.eps for m in norms} == {1e-6}


def test_encoder_and_decoder_widths_differ():
    config = VqConfig(
        resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16,
        decoder_ch=16, decoder_ch_mult=(1, 3), decoder_num_res_blocks=2,
    )  # fmt: skip
    model = VqModel(config)
    assert model.encoder.conv_in.out_channels == 8
    assert model.decoder.conv_in.out_channels == 48 and len(model.decoder.up[0].block) == 3


def test_encode_and_decode_shapes():
    model, x = VqModel(TINY), torch.randn(3, 3, 16, 16)
    x_hat, quantized = model(x)
    assert quantized.codes.shape == (3, 8, 8) and x_hat.shape == x.shape
    torch.testing.assert_close(model.decode_codes(quantized.codes), x_hat)


def test_initial_branches_are_zero_and_the_rest_keeps_the_variance():
    model = VqModel(VqConfig(resolution=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=32, n_embed=16))
    block = model.decoder.up[0].block[0]
    assert not block.conv2.weight.any() and not model.encoder.mid.attn_1.proj_out.weight.any()
    y = torch.nn.functional.conv2d(torch.randn(4, 64, 16, 16), block.conv1.weight)
    assert 0.9 < y.std() < 1.1


def test_downsampling_pads_right_and_bottom_only():
    down = VqModel(TINY).encoder.down[0].downsample
    with torch.no_grad():
        down.conv.weight.zero_().add_(1.0)
        down.conv.bias.zero_()
        result = down(torch.ones(1, 8, 4, 4))[0, 0]
    assert result.tolist() == [[72.0, 48.0], [48.0, 32.0]]


def test_attention_stands_where_it_is_asked_for():
    config = dataclasses.replace(TINY, ch_mult=(1, 2, 2), num_res_blocks=2, attn_levels=(1,))
    model = VqModel(config)
    names = {name.rpartition(".q.")[0] for name in model.state_dict() if ".q." in name}
    assert names == {
        *("encoder.down.1.attn.0", "encoder.down.1.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1"),
        *("decoder.up.1.attn.0", "decoder.up.1.attn.1", "decoder.up.1.attn.2"),
    }
    bare = VqModel(dataclasses.replace(TINY, mid_attention=False))
    assert not any("attn" in name for name in bare.state_dict())
    assert bare(torch.randn(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)


def test_attention_of_a_level_follows_each_block():
    config = dataclasses.replace(TINY, num_res_blocks=2, attn_levels=(0,))
    torch.manual_seed(0)
    level = VqModel(config).encoder.down[0]
    for p in level.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 8, 4, 4)
    h = level.attn[1](level.block[1](level.attn[0](level.block[0](x))))
    assert torch.equal(level(x), h) and not torch.equal(h, level.block[1](level.block[0](x)))


def test_a_model_without_decoder_encodes_only(tmp_path):
    whole = VqModel(TINY).eval()
    half = VqModel(dataclasses.replace(TINY, decoder=False)).eval()
    half.load_state_dict({name: t for name, t in whole.state_dict().items() if not name.startswith("decoder.")})
    x = torch.randn(1, 3, 16, 16)
    save_vq(half, tmp_path)
    half = load_vq(tmp_path)
    codes = half.encode(x).codes
    assert torch.equal(codes, whole.encode(x).codes)
    text = "got an image tokenizer without a decoder, need one that has it .*: take Chameleon's vqgan.ckpt"
    for call in (lambda: half.decode_codes(codes), lambda: half(x)):
        with pytest.raises(ValueError, match=text):
            call()


def test_one_set_of_weights_serves_every_size(tmp_path):
    """An asset of 16 pixels, and the same weights as one of 32: equal codes and pictures, mid attention and all."""
    torch.manual_seed(0)
    model = VqModel(dataclasses.replace(TINY, attn_levels=(1,)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_vq(model, tmp_path / "16")
    save_vq(model, tmp_path / "32")
    fields = json.loads((tmp_path / "32" / "vqgan.json").read_text())
    (tmp_path / "32" / "vqgan.json").write_text(json.dumps(fields | {"resolution": 32}))
    small, large = load_vq(tmp_path / "16"), load_vq(tmp_path / "32")
    assert small.config.grid == (8, 8) and large.config.grid == (16, 16)
    x = torch.randn(2, 3, 32, 32)
    codes = large.encode(x).codes
    assert codes.shape == (2, 16, 16) and len(codes.unique()) > 3
    assert torch.equal(small.encode(x).codes, codes)
    assert torch.equal(small.decode_codes(codes), large.decode_codes(codes))


def test_fields_younger_than_the_first_assets_are_written_where_they_differ(tmp_path):
    """So a recipe run again gives the bytes, and with them the hash, of the asset that it made before."""
    younger = {"attn_levels", "mid_attention", "decoder", "preprocessing"}
    save_vq(VqModel(TINY), tmp_path)
    assert not younger & set(json.loads((tmp_path / "vqgan.json").read_text()))
    config = dataclasses.replace(TINY, attn_levels=(1,), mid_attention=False, decoder=False, preprocessing="hf")
    save_vq(VqModel(config), tmp_path)
    assert younger <= set(json.loads((tmp_path / "vqgan.json").read_text()))
    assert load_vq(tmp_path).config == config


@pytest.mark.parametrize(
    "change, text",
    [
        ({"attn_levels": (2,)}, r"got attn_levels \[2\], need rising numbers of levels from 0 to 1: correct them"),
        ({"attn_levels": (1, 0)}, r"got attn_levels \[1, 0\], need rising numbers"),
        ({"preprocessing": "clip"}, "got preprocessing 'clip', need one of crop, pad, meta, hf: choose one"),
        ({"ch": 0}, r"got sizes and widths \[.*0.*\], need one level or more and numbers from 1 to 1048576: correct"),
        ({"ch_mult": ()}, "need one level or more"),
        ({"n_embed": 2**40}, "need one level or more and numbers from 1 to 1048576"),
    ],
)
def test_settings_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TINY, **change)


def test_levels_must_agree():
    with pytest.raises(ValueError, match="got 3 encoder and 2 decoder levels, need equal"):
        VqConfig(ch_mult=(1, 2, 4), decoder_ch_mult=(1, 2))


def test_resolution_must_divide():
    with pytest.raises(ValueError, match="got resolution 20, need a multiple of 8"):
        VqConfig(resolution=20, ch_mult=(1, 1, 1, 1))


def test_save_and_load(tmp_path):
    model = VqModel(TINY).eval()
    save_vq(model, tmp_path, torch.float16)
    again = load_vq(tmp_path)
    assert again.config == model.config
    for name, t in again.state_dict().items():
        assert t.dtype == torch.float32
        assert torch.equal(t, model.state_dict()[name].half().float())
    assert not any(p.requires_grad for p in again.parameters())


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="got no vqgan.json in .*need vqgan.json and vqgan.safetensors"):
        load_vq(tmp_path)


def test_load_refuses_unknown_keys_and_other_shapes(tmp_path):
    save_vq(VqModel(TINY), tmp_path)
    fields = json.loads((tmp_path / "vqgan.json").read_text())
    (tmp_path / "vqgan.json").write_text(json.dumps(fields | {"chanels": 3}))
    with pytest.raises(ValueError, match="vqgan.json: got the unknown key chanels, need a field of VqConfig"):
        load_vq(tmp_path)
    (tmp_path / "vqgan.json").write_text(json.dumps(fields | {"n_embed": 17}))
    with pytest.raises(ValueError, match="got weights that do not fit .*first quantize.embedding.weight"):
        load_vq(tmp_path)


def test_load_names_a_damaged_file(tmp_path):
    save_vq(VqModel(TINY), tmp_path)
    data = (tmp_path / "vqgan.safetensors").read_bytes()
    (tmp_path / "vqgan.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="got .*vqgan.safetensors, which is no complete safetensors file .*fetch it"):
        load_vq(tmp_path)
    fields = json.loads((tmp_path / "vqgan.json").read_text())
    (tmp_path / "vqgan.json").write_text(json.dumps(fields | {"resolution": "16"}))
    with pytest.raises(ValueError, match=r"vqgan.json: got resolution='16' \(str\), need int: change resolution"):
        load_vq(tmp_path)
    for content, text in (
        ("{", "which is not JSON .*need it: copy"),
        ("[]", "that holds no mapping, need fields of VqC"),
    ):
        (tmp_path / "vqgan.json").write_text(content)
        with pytest.raises(ValueError, match=f"got .*vqgan.json,? {text}"):
            load_vq(tmp_path)
