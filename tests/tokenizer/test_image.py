import dataclasses
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moma.tokenizer.image import FITS, FORMATS, ImageTokenizer, open_image, preprocess, to_pixels, to_tensor
from moma.vqgan.model import VqConfig, VqModel

ASSET = Path(__file__).parents[2] / "tokenizers" / "small"


def picture(width=40, height=30, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze() if mode == "L" else pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = VqConfig(resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16)
    model = VqModel(config)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(20)
    return ImageTokenizer(model, batch=4)


@pytest.fixture(scope="module")
def small():
    if not (ASSET / "vqgan.safetensors").is_file():
        pytest.skip("the asset `small` is not there")
    return ImageTokenizer.load(ASSET)


@pytest.mark.parametrize("format", FORMATS)
def test_open_each_allowed_format(format):
    assert open_image(encoded(picture(), format)).size == (40, 30)


def test_open_refuses_other_formats():
    with pytest.raises(ValueError, match="got a.tiff, which is none of PNG, JPEG, WEBP, GIF, BMP"):
        open_image(encoded(picture(), "TIFF"), "a.tiff")
    with pytest.raises(ValueError, match="got notes, which is none of PNG"):
        open_image(b"hello", "notes")
    with pytest.raises(ValueError, match="need a picture of one of these formats: convert or remove it"):
        open_image(b"", "empty")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_open_names_a_truncated_file(format):
    data = encoded(picture(200, 200), format)
    with pytest.raises(ValueError, match="got x.img, which is"):
        open_image(data[: len(data) // 2], "x.img")


def test_truncated_message():
    data = encoded(picture(200, 200), "JPEG")
    with pytest.raises(ValueError, match="truncated or damaged .*need a complete picture: fetch it again or remove it"):
        open_image(data[: len(data) // 2], "x.jpg")


def test_open_refuses_large_pictures_before_decoding_them():
    with pytest.raises(ValueError, match="got big.png with 40x30 pixels, need at most 1000 pixels: shrink or remove"):
        open_image(encoded(picture()), "big.png", max_pixels=1000)
    # A header that claims 60000 x 60000 pixels in a few bytes.
    bomb = bytearray(encoded(picture(1, 1)))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ValueError, match="got bomb.png with .*need at most"):
        open_image(bytes(bomb), "bomb.png")


def test_open_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(picture(), "JPEG", exif=exif.tobytes())).size == (30, 40)


def test_transparency_becomes_white():
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    pixels[:, 10:] = (255, 0, 0, 255)
    result = preprocess(Image.fromarray(pixels), 20)
    assert result[:, 0].tolist() == [[255, 255, 255]] * 20 and result[:, -1].tolist() == [[255, 0, 0]] * 20
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    assert (preprocess(palette, 8) == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("fit", FITS)
def test_preprocess_gives_a_square_of_bytes(mode, fit):
    result = preprocess(picture(50, 20, mode), 16, fit)
    assert result.shape == (16, 16, 3) and result.dtype == np.uint8


def test_crop_keeps_the_centre_and_pad_keeps_everything():
    pixels = np.full((20, 60, 3), 255, dtype=np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    crop = preprocess(image, 20, "crop")
    assert crop[10, 10].tolist() == [0, 255, 0] and crop[10, 4].tolist() == [0, 255, 0]
    pad = preprocess(image, 30, "pad")
    assert pad[0].tolist() == [[255, 255, 255]] * 30 and pad[-1].tolist() == [[255, 255, 255]] * 30
    assert [pad[15, x].tolist() for x in (4, 15, 25)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("fit", FITS)
def test_preprocess_of_a_strip(fit):
    assert preprocess(Image.new("RGB", (20000, 1)), 16, fit).shape == (16, 16, 3)
    # resized as a whole, this one would have 5 billion pixels
    assert preprocess(Image.new("RGB", (20000, 1)), 512, fit).shape == (512, 512, 3)


def test_preprocess_refuses_an_unknown_fit():
    with pytest.raises(ValueError, match="got fit 'stretch', need one of crop, pad, meta, hf: choose one"):
        preprocess(picture(), 16, "stretch")


SIZES = [(40, 30), (97, 131), (16, 16), (70, 33), (9, 60), (51, 77)]
MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "RGB with a clear colour", "P with a clear colour"]


def picture_of(mode, width, height):
    """A picture of noise in any mode; its alpha, where it has one, is noise too."""
    image = picture(width, height, "RGBA", seed=width)
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(width).integers(0, 300, (height, width), dtype=np.uint16))
    if mode == "RGB with a clear colour":
        image = image.convert("RGB")
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode == "P with a clear colour":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode not in ("RGBA", "LA"):
        image = image.convert("RGB").convert(mode)
    return image.convert("LA") if mode == "LA" else image


@pytest.mark.parametrize("mode", MODES)
def test_meta_is_chameleons_own(mode):
    """Every step in plain numbers: blended in float64 and rounded down, sides rounded, whole pixels cut off."""
    for width, height in SIZES:
        image = picture_of(mode, width, height)
        if mode == "RGB with a clear colour":
            plain = image  # RGB is taken as it is
        else:
            values = np.array(image.convert("RGBA"), dtype=np.float64)
            share = values[:, :, 3:] / 255.0
            plain = Image.fromarray(np.floor((1 - share) * 255 + share * values[:, :, :3]).astype(np.uint8))
        scale = 24 / min(width, height)
        wide, high = round(width * scale), round(height * scale)
        left, top = (wide - 24) // 2, (high - 24) // 2
        whole = np.array(plain.resize((wide, high), Image.Resampling.LANCZOS))
        expected = whole[top : top + 24, left : left + 24]
        result = preprocess(image, 24, "meta")
        assert np.array_equal(result, expected)
        scaled = torch.from_numpy(expected / 255.0 * 2 - 1).permute(2, 0, 1).float()
        assert torch.equal(to_tensor(result[None], preprocessing="meta")[0], scaled)


@pytest.mark.parametrize("mode", MODES)
def test_hf_is_the_processor_of_transformers(mode):
    processing = pytest.importorskip("transformers.models.chameleon.image_processing_pil_chameleon")
    processor = processing.ChameleonImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    for width, height in SIZES:
        image = picture_of(mode, width, height)
        expected = torch.tensor(np.asarray(processor(image)["pixel_values"][0]))
        result = to_tensor(preprocess(image, 24, "hf")[None], preprocessing="hf")[0]
        assert expected.shape == (3, 24, 24) and expected.std() > 0.05
        assert torch.equal(result, expected)


def test_public_preprocessing_cuts_whole_pixels_where_crop_takes_the_middle():
    """50 x 24 -> 24: 13 and 13 pixels fall off, all agree. 51 x 24: `crop` cuts 13.5, the others 13 on the left."""
    ramp = np.broadcast_to(np.arange(51, dtype=np.uint8)[None, :, None] * 5, (24, 51, 3))
    even, odd = Image.fromarray(ramp[:, :50].copy()), Image.fromarray(ramp.copy())
    for fit in ("meta", "hf"):
        assert np.array_equal(preprocess(even, 24, fit), preprocess(even, 24, "crop"))
        shift = preprocess(odd, 24, "crop").astype(int) - preprocess(odd, 24, fit)
        assert set(shift[:, 3:-3].flatten().tolist()) <= {2, 3}  # half of a step of 5


def test_scales_of_the_variants():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    crop, pad, meta, hf = (to_tensor(pixels, preprocessing=fit)[0, 0].flatten() for fit in FITS)
    assert torch.equal(crop, pad)
    torch.testing.assert_close(crop, meta, rtol=0, atol=6e-8)
    assert hf.min() == -1 and hf.max().item() == pytest.approx(0.0078 * 255 - 1, abs=1e-7)


def test_an_asset_brings_its_own_preprocessing(tokenizer):
    image, tensors = picture(41, 30, "RGBA"), {}
    for fit in FITS:
        config = dataclasses.replace(tokenizer.model.config, preprocessing=fit)
        model = VqModel(config)
        model.load_state_dict(tokenizer.model.state_dict())
        own = ImageTokenizer(model, batch=4)
        tensors[fit] = to_tensor(preprocess(image, 16, fit)[None], preprocessing=fit)
        expected = own.model.encode(tensors[fit].repeat(4, 1, 1, 1)).codes[:1].flatten(1)
        assert np.array_equal(own.encode([image]), expected.numpy())
        pixels = preprocess(image, 16, "pad")
        assert np.array_equal(own.encode([image], "pad"), own.encode_pixels(pixels[None]))
    assert len({t.numpy().tobytes() for t in tensors.values()}) == 4


def test_pixels_of_another_size_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"got pictures of shape \(2, 32, 32, 3\), need \(n, 16, 16, 3\): preprocess"):
        tokenizer.encode_pixels(np.zeros((2, 32, 32, 3), np.uint8))


def test_a_tokenizer_without_decoder_says_so(tokenizer):
    model = VqModel(dataclasses.replace(tokenizer.model.config, decoder=False))
    half = ImageTokenizer(model, batch=4)
    codes = half.encode([picture()])
    with pytest.raises(ValueError, match="got an image tokenizer without a decoder, need one that has it"):
        half.decode(codes)


def test_codes_of_the_asset_are_what_they_were(small):
    """Drawn pictures whose two best codes are 3 % or more apart everywhere: no rounding changes them."""
    y, x = np.mgrid[:64, :64]
    drawn = [
        [((x - 32) ** 2 * (k % 7 + 1) // 16 + (y - 20 - c * k % 30) ** 2 // 8 + 37 * k * c) % 256 for c in range(3)]
        for k in (343, 154, 36)
    ]
    codes = small.encode_pixels(np.stack(drawn).transpose(0, 2, 3, 1).astype(np.uint8))
    digest = hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest()
    assert digest == "a907d47a4e631688db56629c8b0eb6ee3f67643bfba1733dca030c2a9824112b"


def test_pixels_survive_the_tensor_form():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    x = to_tensor(pixels)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.array_equal(to_pixels(x), pixels)


def test_encode_and_decode(tokenizer):
    images = [picture(seed=i) for i in range(6)]
    codes = tokenizer.encode(images)
    assert codes.shape == (6, 64) and codes.dtype == np.int64
    assert 0 <= codes.min() and codes.max() < 16 and len(np.unique(codes)) > 1
    decoded = tokenizer.decode(codes)
    assert len(decoded) == 6 and all(image.size == (16, 16) and image.mode == "RGB" for image in decoded)


def test_nothing_in_nothing_out(tokenizer):
    assert tokenizer.encode([]).shape == (0, 64)
    assert tokenizer.decode(np.zeros((0, 64), dtype=np.int64)) == []


def test_decode_refuses_wrong_codes(tokenizer):
    with pytest.raises(ValueError, match=r"got codes of shape \(64,\), need \(n, 64\): one row per picture"):
        tokenizer.decode(np.zeros(64, dtype=np.int64))
    with pytest.raises(
        ValueError, match="got codes from 16 to 16, need 0 to 15: subtract the vocabulary's image_start"
    ):
        tokenizer.decode(np.full((1, 64), 16))


def check_same_codes_and_pixels_in_any_company(tokenizer, n):
    images = [picture(80, 70, seed=i) for i in range(n)]
    codes = tokenizer.encode(images)
    assert np.array_equal(tokenizer.encode(images), codes)
    assert np.array_equal(np.concatenate([tokenizer.encode([image]) for image in images]), codes)
    assert np.array_equal(tokenizer.encode(images[::-1])[::-1], codes)
    pixels = tokenizer.decode_pixels(codes)
    assert np.array_equal(np.concatenate([tokenizer.decode_pixels(row[None]) for row in codes]), pixels)


def test_codes_do_not_depend_on_the_batch(tokenizer):
    check_same_codes_and_pixels_in_any_company(tokenizer, 7)


def test_codes_of_the_asset_do_not_depend_on_the_batch(small):
    check_same_codes_and_pixels_in_any_company(small, 5)


def test_the_asset_keeps_a_plain_picture(small):
    assert small.size == 64 and small.grid == (8, 8) and small.n_codes == 1024
    image = Image.new("RGB", (64, 64), "white")
    image.paste((255, 204, 77), (16, 16, 48, 48))  # emoji yellow
    again = np.asarray(small.decode(small.encode([image]))[0], dtype=float)
    assert np.abs(again - np.asarray(image)).mean() < 20
