"""Convolutional VQ-GAN of the taming family (arXiv 2012.09841): Chameleon's image tokenizer, at any width.

    x (n,3,s,s) in [-1,1] -> encoder -> quant_conv 1x1 -> codes (n,s/f,s/f) -> post_quant_conv 1x1 -> decoder

    encoder  conv_in, per level num_res_blocks x [norm swish conv norm swish conv + skip], stride-2 conv
             between levels; mid: block, attention, block; norm, swish, conv_out
    decoder  the mirror image with num_res_blocks + 1 blocks per level and nearest upsampling + conv

GroupNorm has `norm_groups` groups (their greatest common divisor with the width), eps 1e-6. Narrow models
need few: a group of one channel is an instance norm, which takes a picture's brightness and colour away.
The stride-2 convolution pads right and bottom only. f = 2^(levels - 1). Parameter names are taming's, so
published checkpoints load by name. Encoder and decoder may have their own widths (encoding is done for every
picture of a corpus, decoding for a few).

Refused: attention outside the mid block, temporal embeddings, double_z, resampling without convolution.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moma.vqgan.quantize import Quantized, VectorQuantizer


@dataclass(frozen=True)
class VqConfig:
    """Shape of a VQ-GAN; names as in taming's YAML. `decoder_*` default (None) to the encoder's values."""

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # JSON gives lists
        if self.decoder_ch_mult is not None:
            object.__setattr__(self, "decoder_ch_mult", tuple(self.decoder_ch_mult))
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


CHAMELEON = VqConfig(resolution=512)  # arXiv 2405.09818: 512 px -> 32x32 codes of 8192


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


class Encoder(nn.Module):
    """Pictures (n, 3, s, s) -> features (n, z_channels, s/f, s/f)."""

    def __init__(self, config: VqConfig):
        super().__init__()
        width = config.ch
        self.conv_in = _conv(config.in_channels, width)
        self.down = nn.ModuleList()
        for level, out in enumerate(config.encoder_widths):
            stage = nn.Module()
            stage.block, width = _blocks(width, out, config.num_res_blocks, config.norm_groups)
            if level < len(config.encoder_widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = _mid(width, config.norm_groups)
        self.norm_out = _norm(width, config.norm_groups)
        self.conv_out = _conv(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
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
        self.mid = _mid(width, config.norm_groups)
        stages = []
        for level, out in reversed(list(enumerate(config.decoder_widths))):
            stage = nn.Module()
            stage.block, width = _blocks(width, out, config.decoder_blocks, config.norm_groups)
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
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VqModel(nn.Module):
    """Encoder, quantiser and decoder; state-dict names as in taming."""

    def __init__(self, config: VqConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
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
        """Pictures (n, 3, s, s), about [-1, 1] and not clamped, from code vectors (n, embed_dim, h, w)."""
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
    (folder / "vqgan.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n")
    weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "vqgan.safetensors")


def load_vq(folder: Path, device: torch.device | str = "cpu") -> VqModel:
    """The model of a folder written by `save_vq`, in float32 and evaluation mode, on `device`.

    ValueError if a file is missing, a key of the JSON is unknown, or names or shapes of the weights differ.
    """
    for name in ("vqgan.json", "vqgan.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"got no {name} in {folder}, need vqgan.json and vqgan.safetensors: "
                "give a tokenizer folder, or make one with `moma train_vq`"
            )
    fields = json.loads((folder / "vqgan.json").read_text())
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(VqConfig)})
    if unknown:
        raise ValueError(f"got unknown keys {unknown} in {folder / 'vqgan.json'}, need fields of VqConfig: remove them")
    with torch.device("meta"):
        model = VqModel(VqConfig(**fields))
    weights = {name: t.float() for name, t in load_file(folder / "vqgan.safetensors").items()}
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


def _blocks(width_in: int, width_out: int, n: int, groups: int) -> tuple[nn.ModuleList, int]:
    widths = [width_in] + [width_out] * n
    return nn.ModuleList(ResnetBlock(*pair, groups) for pair in itertools.pairwise(widths)), width_out


def _mid(width: int, groups: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.block_2 = ResnetBlock(width, width, groups), ResnetBlock(width, width, groups)
    mid.attn_1 = AttnBlock(width, groups)
    return mid
