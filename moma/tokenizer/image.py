"""Pictures to image codes and back: safe opening, preprocessing, batched encoding and decoding.

    bytes -> open_image -> preprocess (white background, s x s) -> VQ-GAN -> codes (n, h*w), raster order

The four ways of preprocessing; an asset names its own (`preprocessing` in vqgan.json), all resize with LANCZOS:

    crop   the middle square, cut at sub-pixels, resized            x / 127.5 - 1
    pad    long side to s, in the middle of a white square          x / 127.5 - 1
    meta   Chameleon's own code: short side to s, the other length  x / 255 * 2 - 1
           rounded; whole pixels cut off; blended on white in
           floats, rounded down
    hf     transformers' ChameleonImageProcessor (its PIL form):    0.0078 x - 1, up to 0.989
           as `meta`, but the length rounded down, and blended
           by Pillow

`crop` takes the exact middle, the two public ones cut whole pixels off: they lie up to half a pixel apart.

Codes are 0 .. n_codes - 1, not vocabulary ids (`image id = image_start + code`). Every network pass has the
same batch shape (short batches are filled up), so a picture's codes do not depend on its company.

Refused, as ValueError naming the file: formats other than PNG, JPEG, WEBP, GIF and BMP, more than MAX_PIXELS
pixels, truncated or damaged files. Of an animation the first frame is used.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from moma.vqgan.model import Preprocessing, VqModel, load_vq

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20  # refuses decompression bombs before any pixel is decoded
FITS = get_args(Preprocessing)


def open_image(data: bytes, name: str = "picture", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode untrusted picture bytes, upright per EXIF; `name` stands in the messages.

    ValueError if the format is not in FORMATS, the picture has more than `max_pixels` pixels or is damaged.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is a process-wide setting; ours is checked below, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, str(error), max_pixels)) from error
    except Exception as error:  # Pillow's parsers raise many kinds; all of them mean an unreadable header
        raise ValueError(
            f"got {name}, which is none of {', '.join(FORMATS)} or has a damaged header, need a picture of "
            "one of these formats: convert or remove it"
        ) from error
    if image.width * image.height > max_pixels:
        raise ValueError(_too_large(name, f"{image.width}x{image.height} pixels", max_pixels))
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise ValueError(
            f"got {name}, which is truncated or damaged ({type(error).__name__}: {error}), need a complete "
            "picture: fetch it again or remove it"
        ) from error


def preprocess(image: Image.Image, size: int, fit: str = "crop") -> np.ndarray:
    """Picture -> uint8 (size, size, 3), transparency blended on white; `fit`: one of FITS, as listed above.

    A strip that `meta` or `hf` would blow up to more than MAX_PIXELS is cut as by `crop` instead.
    """
    if fit not in FITS:
        raise ValueError(f"got fit {fit!r}, need one of {', '.join(FITS)}: choose one")
    image = _on_white(image, fit)
    if fit == "pad":
        square = Image.new("RGB", (size, size), "white")
        width, height = (max(1, round(length * size / max(image.size))) for length in image.size)
        inner = image.resize((width, height), Image.Resampling.LANCZOS)
        square.paste(inner, ((size - width) // 2, (size - height) // 2))
        return np.asarray(square, dtype=np.uint8)
    side = min(image.size)
    if fit == "hf":
        whole = [int(size * length / side) for length in image.size]
    else:
        whole = [round(size / side * length) for length in image.size]
    if fit == "crop" or whole[0] * whole[1] > MAX_PIXELS:
        # Resizing the box itself keeps a 1 x 60000 strip from becoming a huge intermediate picture.
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    else:
        left, top = ((length - size) // 2 for length in whole)
        resized = image.resize(whole, Image.Resampling.LANCZOS)
        square = resized.crop((left, top, left + size, top + size))
    return np.asarray(square, dtype=np.uint8)


def to_tensor(
    pixels: np.ndarray, device: torch.device | str = "cpu", preprocessing: Preprocessing = "crop"
) -> torch.Tensor:
    """uint8 (n, s, s, 3) -> float32 (n, 3, s, s) in [-1, 1], by the formula of `preprocessing` above."""
    if preprocessing in ("crop", "pad"):
        return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    values = np.arange(256) / 255 * 2 - 1  # float64, as in both public programs, then rounded once
    if preprocessing == "hf":
        values = (np.arange(256) * 0.0078).astype(np.float32) - np.float32(1)
    return torch.tensor(values.astype(np.float32)[pixels], device=device).permute(0, 3, 1, 2).contiguous()


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """(n, 3, s, s), clamped to [-1, 1] -> uint8 (n, s, s, 3), to the nearest (Chameleon's own code rounds down)."""
    x = x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageTokenizer:
    """A VQ-GAN with its preprocessing; `size` pixels a side, `grid` codes, `n_codes` code-book entries."""

    def __init__(self, model: VqModel, device: torch.device | str = "cpu", batch: int = 16):
        self.model = model.to(device).eval()
        self.device, self.batch = torch.device(device), batch
        self.size, self.grid, self.n_codes = model.config.resolution, model.config.grid, model.config.n_embed
        self.preprocessing: Preprocessing = model.config.preprocessing

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """Tokenizer of a folder with `vqgan.json` and `vqgan.safetensors`; ValueError if they do not fit."""
        return cls(load_vq(Path(folder), device), device)

    def encode(self, images: Sequence[Image.Image], fit: str | None = None) -> np.ndarray:
        """Codes int64 (n, h*w) of pictures of any size and mode, raster order; `fit` (None: the asset's own) as in
        `preprocess`."""
        pixels = [preprocess(image, self.size, fit or self.preprocessing) for image in images]
        return self.encode_pixels(np.stack(pixels) if pixels else np.zeros((0, self.size, self.size, 3), np.uint8))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 (n, h*w) of preprocessed pictures uint8 (n, size, size, 3); ValueError on another shape."""
        if pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"got pictures of shape {pixels.shape}, need (n, {self.size}, {self.size}, 3): preprocess them to the "
                "tokenizer's size, or load the same weights with their resolution in vqgan.json"
            )

        def run(part: np.ndarray) -> np.ndarray:
            return self.model.encode(to_tensor(part, self.device, self.preprocessing)).codes.cpu().numpy()

        return self._batched(run, pixels).reshape(len(pixels), self.grid[0] * self.grid[1])

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Pictures, size x size, from `codes` (n, h*w) integers; ValueError on a wrong shape or range."""
        return [Image.fromarray(pixels) for pixels in self.decode_pixels(codes)]

    def decode_pixels(self, codes: np.ndarray) -> np.ndarray:
        """uint8 (n, size, size, 3) from `codes` (n, h*w) integers.

        ValueError on a wrong shape or range, and if the tokenizer has no decoder.
        """
        codes, per_image = np.asarray(codes, dtype=np.int64), self.grid[0] * self.grid[1]
        if codes.ndim != 2 or codes.shape[1] != per_image:
            raise ValueError(f"got codes of shape {codes.shape}, need (n, {per_image}): one row per picture")
        if codes.size and not (0 <= codes.min() and codes.max() < self.n_codes):
            raise ValueError(
                f"got codes from {codes.min()} to {codes.max()}, need 0 to {self.n_codes - 1}: "
                "subtract the vocabulary's image_start from token ids"
            )
        grid = codes.reshape(-1, *self.grid)
        run = lambda part: to_pixels(self.model.decode_codes(torch.from_numpy(part).to(self.device)))  # noqa: E731
        return self._batched(run, grid).reshape(len(codes), self.size, self.size, 3)

    @torch.inference_mode()
    def _batched(self, run: Callable[[np.ndarray], np.ndarray], items: np.ndarray) -> np.ndarray:
        """`run` over `items` in batches of exactly `self.batch`, so that kernels chosen by shape agree."""
        parts = []
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            fill = np.repeat(part[-1:], self.batch - len(part), axis=0)
            parts.append(run(np.concatenate([part, fill]))[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0,), dtype=np.int64)


def _on_white(image: Image.Image, fit: str) -> Image.Image:
    """`image` in mode RGB."""
    if image.mode == "RGB" and not (fit == "hf" and "transparency" in image.info):
        return image
    rgba = image.convert("RGBA")
    if fit == "meta":
        values = np.asarray(rgba)
        opaque = values[..., 3:] / 255.0
        return Image.fromarray(((1 - opaque) * 255 + opaque * values[..., :3]).astype(np.uint8))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _too_large(name: str, what: str, max_pixels: int) -> str:
    return f"got {name} with {what}, need at most {max_pixels} pixels: shrink or remove it"
