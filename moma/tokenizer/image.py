"""Pictures to image codes and back: safe opening, preprocessing, batched encoding and decoding.

    bytes -> open_image -> preprocess (white background, s x s) -> VQ-GAN -> codes (n, h*w), raster order

Codes are 0 .. n_codes - 1, not vocabulary ids (`image id = image_start + code`). Every network pass has the
same batch shape (short batches are filled up), so a picture's codes do not depend on its company.

Refused, as ValueError naming the file: formats other than PNG, JPEG, WEBP, GIF and BMP, more than MAX_PIXELS
pixels, truncated or damaged files. Of an animation the first frame is used.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from moma.vqgan.model import VqModel, load_vq

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20  # refuses decompression bombs before any pixel is decoded
FITS = ("crop", "pad")


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
    """Picture -> uint8 (size, size, 3): transparency blended on white, resized with LANCZOS.

    `crop`: short side to `size`, centre crop (Chameleon). `pad`: long side to `size`, on a white square.
    """
    if fit not in FITS:
        raise ValueError(f"got fit {fit!r}, need one of {', '.join(FITS)}: choose one")
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    side = min(image.size) if fit == "crop" else max(image.size)
    width, height = (max(1, round(length * size / side)) for length in image.size)
    if fit == "crop":
        # Resizing the box itself keeps a 1 x 60000 strip from becoming a huge intermediate picture.
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    else:
        square = Image.new("RGB", (size, size), "white")
        inner = image.resize((width, height), Image.Resampling.LANCZOS)
        square.paste(inner, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square, dtype=np.uint8)


def to_tensor(pixels: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (n, s, s, 3) -> float32 (n, 3, s, s) in [-1, 1], x / 255 * 2 - 1."""
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """(n, 3, s, s), clamped to [-1, 1] -> uint8 (n, s, s, 3)."""
    x = x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageTokenizer:
    """A VQ-GAN with its preprocessing; `size` pixels a side, `grid` codes, `n_codes` code-book entries."""

    def __init__(self, model: VqModel, device: torch.device | str = "cpu", batch: int = 16):
        self.model = model.to(device).eval()
        self.device, self.batch = torch.device(device), batch
        self.size, self.grid, self.n_codes = model.config.resolution, model.config.grid, model.config.n_embed

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """Tokenizer of a folder with `vqgan.json` and `vqgan.safetensors`; ValueError if they do not fit."""
        return cls(load_vq(Path(folder), device), device)

    def encode(self, images: Sequence[Image.Image], fit: str = "crop") -> np.ndarray:
        """Codes int64 (n, h*w) of pictures of any size and mode, raster order; `fit` as in `preprocess`."""
        pixels = [preprocess(image, self.size, fit) for image in images]
        return self.encode_pixels(np.stack(pixels) if pixels else np.zeros((0, self.size, self.size, 3), np.uint8))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 (n, h*w) of preprocessed pictures uint8 (n, size, size, 3)."""
        run = lambda part: self.model.encode(to_tensor(part, self.device)).codes.cpu().numpy()  # noqa: E731
        return self._batched(run, pixels).reshape(len(pixels), self.grid[0] * self.grid[1])

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Pictures, size x size, from `codes` (n, h*w) integers; ValueError on a wrong shape or range."""
        return [Image.fromarray(pixels) for pixels in self.decode_pixels(codes)]

    def decode_pixels(self, codes: np.ndarray) -> np.ndarray:
        """uint8 (n, size, size, 3) from `codes` (n, h*w) integers; ValueError on a wrong shape or range."""
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


def _too_large(name: str, what: str, max_pixels: int) -> str:
    return f"got {name} with {what}, need at most {max_pixels} pixels: shrink or remove it"
