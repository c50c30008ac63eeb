"""Convolutional VQ-GAN of the taming family (arXiv 2012.09841): Chameleon's image tokenizer, at any width.

    x (n,3,s,s) in [-1,1] -> encoder -> quant_conv 1x1 -> codes (n,s/f,s/f) -> post_quant_conv 1x1 -> decoder

    encoder  conv_in, per level num_res_blocks x [norm swish conv norm swish conv + skip], stride-2 conv
             between levels; mid: block, attention, block; norm, swish, conv_out
    decoder  the mirror image with num_res_blocks + 1 blocks per level and nearest upsampling + conv

GroupNorm has `norm_groups` groups (their greatest common divisor with the width), eps 1e-6. Narrow models
need few: a group of one channel is an instance norm, which takes a picture's brightness and colour away.
The stride-2 convolution pads right and bottom only. f = 2^(levels - 1). Parameter names are taming's, so
published checkpoints load by name (`convert.py`). Encoder and decoder may have their own widths (encoding is done
for every picture of a corpus, decoding for a few), and the decoder may be missing.

All layers are convolutions, norms and attention over positions, so the weights serve pictures of any size: an asset
of another `resolution` with the same weights gives the same codes for the same pixels.

Refused: temporal embeddings, double_z, resampling without convolution; decoding without a decoder.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moma.schema import build
from moma.vqgan.quantize import Quantized, VectorQuantizer

Preprocessing = Literal["crop", "pad", "meta", "hf"]  # described where it is done, in moma/tokenizer/image.py


MAX_SIZE = 2**20  # of a width, a code book, a side: what a file asks for stays countable


@dataclass(frozen=True)
class VqConfig:
    """Shape of a VQ-GAN and the form of its input; names as in taming's YAML where it has them.

    `decoder_*` default (None) to the encoder's values. taming's `attn_resolutions` are pixels a side of a feature
    map at one resolution; `attn_levels` are the numbers of these levels, which hold at all of them.
    """

    resolution: int = 64  # pixels, square
    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    decoder_ch: int | None = None
    decoder_ch_mult: tuple[int, ...] | None = None
    decoder_num_res_blocks: int | None = None
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 8192
    norm_groups: int = 32  # of every GroupNorm; fewer where it does not divide the width
    beta: float = 0.25
    legacy: bool = True  # order of the quantiser's loss terms
    ema: bool = False  # code book trained by moving averages instead of gradients
    attn_levels: tuple[int, ...] = ()  # with attention after each residual block; 0 is the finest
    mid_attention: bool = True
    decoder: bool = True  # False: pictures can be encoded only
    preprocessing: Preprocessing = "crop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # JSON gives lists
        object.__setattr__(self, "attn_levels", tuple(self.attn_levels))
        if self.decoder_ch_mult is not None:
            object.__setattr__(self, "decoder_ch_mult", tuple(self.decoder_ch_mult))
        sizes = [self.resolution, self.in_channels, self.z_channels, self.embed_dim, self.norm_groups, self.n_embed]
        sizes += [self.ch, *self.encoder_widths, *self.decoder_widths]
        if not self.ch_mult or not 1 <= min(sizes) <= max(sizes) <= MAX_SIZE:
            raise ValueError(
                f"got sizes and widths {sizes}, need one level or more and numbers from 1 to {MAX_SIZE}: correct them"
            )
        if len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(
                f"got {len(self.encoder_widths)} encoder and {len(self.decoder_widths)} decoder levels, need equal "
                "numbers: give ch_mult and decoder_ch_mult the same length"
            )
        if self.resolution % self.factor:
            raise ValueError(
                f"got resolution {self.resolution}, need a multiple of {self.factor} (2^(levels - 1)): "
                "change resolution or the length of ch_mult"
            )
        if sorted(set(self.attn_levels) & set(range(len(self.ch_mult)))) != list(self.attn_levels):
            raise ValueError(
                f"got attn_levels {list(self.attn_levels)}, need rising numbers of levels from 0 to "
                f"{len(self.ch_mult) - 1}: correct them"
            )
        names = get_args(Preprocessing)
        if self.preprocessing not in names:
            raise ValueError(f"got preprocessing {self.preprocessing!r}, need one of {', '.join(names)}: choose one")

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        ch = self.ch if self.decoder_ch is None else self.decoder_ch
        return tuple(ch * mult for mult in (self.decoder_ch_mult or self.ch_mult))

    @property
    def decoder_blocks(self) -> int:
        """Residual blocks of each decoder level: one more than `num_res_blocks`, as in taming."""
        blocks = self.num_res_blocks if self.decoder_num_res_blocks is None else self.decoder_num_res_blocks
        return blocks + 1

    @property
    def factor(self) -> int:
        """Down-sampling factor f: pixels per code along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of one picture."""
        return self.resolution // self.factor, self.resolution // self.factor


CHAMELEON = VqConfig(resolution=512, preprocessing="meta")  # arXiv 2405.09818: 512 px -> 32x32 codes of 8192
# Younger than the first assets: written only where they differ, so that a recipe run again gives the same bytes.
_YOUNGER = ("attn_levels", "mid_attention", "decoder", "preprocessing")


class ResnetBlock(nn.Module):
    """norm-swish-conv twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__()
        self.norm1 = _norm(width_in, groups)
        self.conv1 = _conv(width_in, width_out)
        self.norm2 = _norm(width_out, groups)
        self.conv2 = _conv(width_out, width_out)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map, plus the input."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Stride-2 convolution, padded at the right and the bottom."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """`n` residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, width_in: int, width_out: int, n: int, groups: int, attention: bool):
        super().__init__()
        widths = [width_in] + [width_out] * n
        self.block = nn.ModuleList(ResnetBlock(*pair, groups) for pair in itertools.pairwise(widths))
        if attention:
            self.attn = nn.ModuleList(AttnBlock(width_out, groups) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if hasattr(self, "attn"):
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    """Pictures (n, 3, s, s) -> features (n, z_channels, s/f, s/f)."""

    def __init__(self, config: VqConfig):
        super().__init__()
        width = config.ch
        self.conv_in = _conv(config.in_channels, width)
        self.down = nn.ModuleList()
        for level, out in enumerate(config.encoder_widths):
            stage = Level(width, out, config.num_res_blocks, config.norm_groups, level in config.attn_levels)
            width = out
            if level < len(config.encoder_widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = _mid(width, config)
        self.norm_out = _norm(width, config.norm_groups)
        self.conv_out = _conv(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (n, z_channels, s/f, s/f) -> pictures (n, 3, s, s), not clamped."""

    def __init__(self, config: VqConfig):
        super().__init__()
        width = config.decoder_widths[-1]
        self.conv_in = _conv(config.z_channels, width)
        self.mid = _mid(width, config)
        stages = []
        for level, out in reversed(list(enumerate(config.decoder_widths))):
            stage = Level(width, out, config.decoder_blocks, config.norm_groups, level in config.attn_levels)
            width = out
            if level > 0:
                stage.upsample = Upsample(width)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # up.0 is the finest level, as in taming
        self.norm_out = _norm(width, config.norm_groups)
        self.conv_out = _conv(width, config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for stage in reversed(self.up):
            h = stage(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VqModel(nn.Module):
    """Encoder, quantiser and, where `config.decoder`, decoder; state-dict names as in taming."""

    def __init__(self, config: VqConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if config.decoder:
            self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(
            config.n_embed, config.embed_dim, beta=config.beta, legacy=config.legacy, ema=config.ema
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        _init(self)

    def features(self, x: Tensor) -> Tensor:
        """Vectors (n, embed_dim, h, w), not quantised, of pictures `x` (n, 3, s, s) in [-1, 1]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Quantized:
        """Quantise pictures `x` (n, 3, s, s) in [-1, 1]."""
        return self.quantize(self.features(x))

    def decode(self, quantized: Tensor) -> Tensor:
        """Pictures (n, 3, s, s), about [-1, 1] and not clamped, from code vectors (n, embed_dim, h, w).

        ValueError if the model has no decoder.
        """
        if not self.config.decoder:
            raise ValueError(
                "got an image tokenizer without a decoder, need one that has it to make pictures of codes: "
                "take Chameleon's vqgan.ckpt and vqgan.yaml, which hold both halves"
            )
        return self.decoder(self.post_quant_conv(quantized))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures (n, 3, s, s), about [-1, 1] and not clamped, from `codes` int64 (n, h, w)."""
        return self.decode(self.quantize.lookup(codes))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruction (n, 3, s, s) and quantisation of pictures `x` (n, 3, s, s) in [-1, 1]."""
        quantized = self.encode(x)
        return self.decode(quantized.quantized), quantized


def save_vq(model: VqModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `vqgan.json` and `vqgan.safetensors` (weights as `dtype`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(model.config)
    for name in _YOUNGER:
        if getattr(model.config, name) == getattr(VqConfig, name):
            del fields[name]
    (folder / "vqgan.json").write_text(json.dumps(fields, indent=2) + "\n")
    weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "vqgan.safetensors")


def load_vq(folder: Path, device: torch.device | str = "cpu") -> VqModel:
    """The model of a folder written by `save_vq`, in float32 and evaluation mode, on `device`.

    ValueError if a file is missing or damaged, a key of the JSON is unknown, or names or shapes of the weights differ.
    """
    for name in ("vqgan.json", "vqgan.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"got no {name} in {folder}, need vqgan.json and vqgan.safetensors: "
                "give a tokenizer folder, or make one with `moma train_vq`"
            )
    try:
        fields = json.loads((folder / "vqgan.json").read_text())
    except ValueError as error:
        raise ValueError(f"got {folder / 'vqgan.json'}, which is not JSON ({error}), need it: copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"got {folder / 'vqgan.json'} that holds no mapping, need fields of VqConfig: copy it again")
    try:
        config = build(VqConfig, fields)
    except ValueError as error:
        raise ValueError(f"{folder / 'vqgan.json'}: {error}") from error
    with torch.device("meta"):
        model = VqModel(config)
    try:
        weights = {name: t.float() for name, t in load_file(folder / "vqgan.safetensors").items()}
    except SafetensorError as error:
        raise ValueError(
            f"got {folder / 'vqgan.safetensors'}, which is no complete safetensors file ({error}), need one: "
            "copy or fetch it again"
        ) from error
    want = {name: t.shape for name, t in model.state_dict().items()}
    wrong = sorted(n for n in want.keys() | weights.keys() if n not in weights or weights[n].shape != want.get(n))
    if wrong:
        raise ValueError(
            f"got weights that do not fit in {folder / 'vqgan.safetensors'} ({len(wrong)} names, first "
            f"{wrong[0]}), need the names and shapes of vqgan.json: use the two files of one training run"
        )
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _init(model: VqModel) -> None:
    """Convolutions keep the variance; branches start at zero, so that the model starts as its skip connections.

    In place of torch's defaults, under which the signal fades from each resolution to the next.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            branch_end = name.endswith((".conv2", ".proj_out"))
            std = 0.0 if branch_end else 1 / math.sqrt(module.weight[0].numel())
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, width), width, eps=1e-6)


def _conv(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


def _mid(width: int, config: VqConfig) -> nn.Module:
    mid, groups = nn.Module(), config.norm_groups
    mid.block_1, mid.block_2 = ResnetBlock(width, width, groups), ResnetBlock(width, width, groups)
    mid.attn_1 = AttnBlock(width, groups) if config.mid_attention else nn.Identity()
    return mid
