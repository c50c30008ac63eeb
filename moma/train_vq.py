"""Train the image tokenizer: pictures in, `vqgan.json` and `vqgan.safetensors` out.

    pictures -> uint8 cache -> seeded batches -> VQ-GAN <-> patch discriminator -> held-out PSNR, asset

The one two-player loop of moma: each step updates the VQ-GAN, then its EMA code book, then (from
`discriminator_start` on) the discriminator. Pictures come from the emoji packages, from folders and from tar
files. Emoji whose concept is held out by `moma/data/sources/split.py` are never trained on, in any vendor's
drawing, so a corpus split the same way stays unseen by its tokenizer; folders and tars are split by listing.

The network is convolutional: `sizes` trains it on squares of several sizes in turn, with as many pixels a step in
each, so that one set of weights serves assets of different grids. `init_from` starts from an earlier asset; a code
book that is larger than its own starts with its codes split into near copies.

The order, the augmentation and the code-book restarts are functions of (seed, step), so a run that is stopped
and started again gives the same bits as one that was not. Under `torchrun` every process takes its share of each
batch; gradients, code-book updates, the adaptive weight and every logged number are those of the whole batch.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from moma import checkpoint
from moma.checkpoint import model_state, optimizer_state
from moma.data.sources.emoji import EmojiConfig, emoji_files, read_picture
from moma.data.sources.files import read_slice, tar_members
from moma.data.sources.raw import Broken
from moma.data.sources.split import concept_key, is_held_out
from moma.distributed import Ranks, average_, first_before_others, gather, process_group
from moma.log import LogConfig, Progress, RunLog
from moma.meter import Duration
from moma.optim import OptimConfig, build_optimizer, clip_, learning_rate, set_learning_rate
from moma.tokenizer.image import ImageTokenizer, open_image, preprocess, to_tensor
from moma.vqgan.losses import PatchDiscriminator, PerceptualLoss, hinge_loss, picture_gradient
from moma.vqgan.metrics import PictureFeatures, reconstruction_metrics
from moma.vqgan.model import VqConfig, VqModel, load_vq, save_vq
from moma.vqgan.quantize import CodebookState, code_statistics, empty_state, update_codebook

_BOOK = "quantize.embedding.weight"
_SPLIT = 0.05  # of a code's copies, as a share of the code book's own spread
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# Fields that may change between a run and its resumption: they do not touch the weights.
_FREE = ("out", "export", "cache", "log", "eval_every", "checkpoint_every", "grid_pictures", "feature_distances")


@dataclass(frozen=True)
class TrainVqConfig:
    """Settings of `moma train_vq`; the defaults are those of the asset `small` (without its photographs)."""

    out: Path = Path("runs/train_vq")  # run folder: metrics, grid, checkpoints
    export: Path | None = None  # folder that gets vqgan.json and vqgan.safetensors; None: <out>/export
    cache: Path = Path(".cache/train_vq")  # preprocessed pictures, reused by later runs
    # Pictures: copies of each source in an epoch (0 = leave it out), tars or folders by path.
    twemoji: int = 3
    openmoji: int = 2
    train_paths: tuple[Path, ...] = ()
    val_paths: tuple[Path, ...] = ()
    sizes: tuple[int, ...] = ()  # pixels a side, in turn; empty: model.resolution alone
    fit: Literal["crop", "pad"] = "crop"
    flip: bool = True  # mirror half of the training pictures
    shift: int = 3  # move them by up to this many pixels
    model: VqConfig = field(
        default_factory=lambda: VqConfig(
            resolution=64,
            ch=16,
            ch_mult=(1, 2, 4, 6),
            num_res_blocks=1,
            decoder_ch=32,
            decoder_ch_mult=(1, 1, 3, 4),
            decoder_num_res_blocks=0,
            z_channels=64,
            embed_dim=16,
            n_embed=1024,
            norm_groups=4,
            ema=True,
        )
    )
    init_from: Path | None = None  # folder of an asset to start from
    steps: int = 4000
    batch_size: int = 16  # at the smallest size; larger pictures come in batches of as many pixels
    lr: float = 6e-4
    end_lr: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    quantizer_weight: float = 1.0
    quantize_start: int = 200  # a plain autoencoder until this step; then codes are drawn from its vectors
    perceptual_weight: float = 0.2
    discriminator_weight: float = 0.0  # 0 = no discriminator
    discriminator_start: int = 0
    discriminator_lr: float = 2e-4
    ema_decay: float = 0.98  # of the code book, where model.ema
    dead_below: float = 0.1  # codes used less than this share of the mean are restarted
    restart_until: float = 0.8  # share of the steps after which codes are left alone
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "cpu"
    threads: int | None = None  # None: torch's choice
    seed: int = 0
    log: LogConfig = LogConfig()
    eval_every: int = 500
    checkpoint_every: int = 250
    grid_pictures: int = 16  # held-out pictures per source in the reconstruction grid
    feature_distances: bool = False  # of the exported asset too: needs the extra `vq`
    export_dtype: Literal["fp16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        if not (self.twemoji or self.openmoji or self.train_paths):
            raise ValueError(
                "got no pictures, need at least one source: set twemoji=1, openmoji=1 or train_paths=[TAR]"
            )
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}, need at least 1: raise it")
        if self.precision not in ("bf16", "fp32") or self.export_dtype not in ("fp16", "fp32"):
            raise ValueError(
                f"got precision={self.precision} and export_dtype={self.export_dtype}, need bf16 or fp32 and "
                "fp16 or fp32: choose one of these"
            )
        if not self.model.decoder or self.model.preprocessing != self.fit:
            raise ValueError(
                f"got model.decoder={self.model.decoder} and model.preprocessing={self.model.preprocessing} with "
                f"fit={self.fit}, need a decoder and one preprocessing: set model.preprocessing as fit"
            )
        for size in self.picture_sizes:
            if size < 1 or size % self.model.factor or self.pictures_of(size) < 1:
                raise ValueError(
                    f"got size {size} in sizes, need multiples of {self.model.factor} pixels of which a batch of "
                    f"{self.batch_size} at the smallest size holds one: change sizes or raise batch_size"
                )

    @property
    def picture_sizes(self) -> tuple[int, ...]:
        """Pixels a side of the pictures, in the order in which the steps take them."""
        return self.sizes or (self.model.resolution,)

    def pictures_of(self, size: int) -> int:
        """Pictures of a step at this size: as many pixels as `batch_size` pictures of the smallest."""
        return self.batch_size * min(self.picture_sizes) ** 2 // size**2


class Adversary(NamedTuple):
    """The second player."""

    model: PatchDiscriminator
    optimizer: torch.optim.Optimizer


class Players(NamedTuple):
    """What one run trains: the VQ-GAN with its EMA state, and the discriminator where there is one."""

    model: VqModel
    optimizer: torch.optim.Optimizer
    ema: CodebookState
    perceptual: PerceptualLoss | None
    adversary: Adversary | None


def train_vq(config: TrainVqConfig) -> dict[str, float]:
    """Train, evaluate on held-out pictures and export; resumes from the newest checkpoint in `config.out`.

    Returns `parameters` and the exported model's held-out metrics (`evaluate_vq`), on the first rank. ValueError if a
    checkpoint of other settings lies in `out`, or if the loss is not finite.
    """
    with process_group(config.device) as ranks:
        return _run(config, ranks)


def _run(config: TrainVqConfig, ranks: Ranks) -> dict[str, float]:
    """What every process does; the first one writes all files but its checkpoints' shards."""
    for size in config.picture_sizes:
        if config.pictures_of(size) % ranks.world:
            raise ValueError(
                f"got {config.pictures_of(size)} pictures of {size} px a step on {ranks.world} processes, need a "
                "multiple: change batch_size or the number of processes"
            )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    first = ranks.rank == 0
    out, export = config.out, config.export or config.out / "export"
    out.mkdir(parents=True, exist_ok=True)
    with first_before_others(ranks):  # which find the pictures in the cache
        collected = {size: collect(config, size) for size in config.picture_sizes}
    held_out = {
        name if len(collected) == 1 else f"{name}@{size}": part
        for size, (_, parts) in collected.items()
        for name, part in parts.items()
    }
    pixels = {size: np.concatenate([part for part, _ in train.values()]) for size, (train, _) in collected.items()}
    train, _ = collected[config.picture_sizes[0]]
    index = np.concatenate([np.tile(numbers, copies) for numbers, copies in _source_ranges(train)])
    del collected, train

    players = _players(config)
    state = _state(players)
    meta = _resume(config, state)
    start = meta.get("step", 0)
    parameters = sum(p.numel() for p in players.model.parameters())
    orders = {size: _Order(index, config.seed) for size in config.picture_sizes}
    log = progress = None
    if first:
        print(
            f"train_vq: {index.max() + 1} training pictures ({len(index)} an epoch), held out "
            + ", ".join(f"{len(part)} {name}" for name, part in held_out.items())
            + f"; {parameters:,} parameters; step {start}/{config.steps}",
            flush=True,
        )
        progress = Progress("train_vq", config.steps, start)
        log = RunLog(out, config.log, _identity(config), meta.get("metrics_offset"), meta.get("wandb_id"))
    for step in range(start, config.steps):
        visit, which = divmod(step, len(config.picture_sizes))
        size = config.picture_sizes[which]
        chosen = pixels[size][orders[size].batch(visit, config.pictures_of(size))]
        share = len(chosen) // ranks.world
        own = _augment(chosen, config, step)[ranks.rank * share : (ranks.rank + 1) * share]
        values = _update(config, players, to_tensor(own, config.device), step)
        done = step + 1
        if done % config.log.interval == 0 or done == config.steps:
            stacked = torch.stack(
                [torch.as_tensor(v, dtype=torch.float64, device=config.device) for v in values.values()]
            )
            average_([stacked])
            row = dict(zip(values, stacked.tolist(), strict=True))
            if not math.isfinite(row["l1"] + row["quantizer"] + row["grad_norm"]):
                raise ValueError(f"got a loss that is not finite at step {done}, need a finite one: lower lr")
            if log is not None and progress is not None:
                log.metrics(done, row)
                text = (f"{name} {row[name]:.4g}" for name in ("l1", "perceptual", "quantizer", "perplexity"))
                progress.update(done, "  ".join(text))
        if log is not None and (done % config.eval_every == 0 or done == config.steps):
            metrics = evaluate_vq(players.model, held_out)
            log.metrics(done, metrics)
            save_grid(players.model, held_out, config.grid_pictures, out / "grid.png")
            print("held out  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)
        if done % config.checkpoint_every == 0 or done == config.steps:
            place = {"metrics_offset": log.offset(), "wandb_id": log.wandb_id} if log is not None else {}
            checkpoint.save(out / "checkpoints", done, state, {"config": _identity(config), **place}, keep_last=2)
    if log is None or progress is None:
        return {}
    progress.close()
    log.close()

    save_vq(players.model, export, torch.float16 if config.export_dtype == "fp16" else torch.float32)
    # What users get is the stored file, so its own numbers are the ones reported.
    exported = load_vq(export, config.device)
    network = PictureFeatures() if config.feature_distances else None
    result = {"parameters": parameters, **evaluate_vq(exported, held_out, features=network)}
    save_grid(exported, held_out, config.grid_pictures, out / "grid.png")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"exported {export}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)
    return result


@torch.no_grad()
def evaluate_vq(
    model: VqModel, held_out: dict[str, np.ndarray], batch: int = 32, features: PictureFeatures | None = None
) -> dict[str, float]:
    """Held-out metrics in float32 for each source's pictures uint8 (n, s, s, 3), named `<metric>/<source>`.

    The metrics are those of `reconstruction_metrics`; with the network `features` the distances of features too.
    """
    metrics = {}
    for name, pixels in held_out.items():
        tokenizer = ImageTokenizer(_at_size(model, pixels.shape[1]), next(model.parameters()).device, batch)
        codes = tokenizer.encode_pixels(pixels)
        again = tokenizer.decode_pixels(codes)
        found = reconstruction_metrics(pixels, again, codes, model.config.n_embed, features)
        metrics |= {f"{key}/{name}": value for key, value in found.items()}
    return metrics


def save_grid(model: VqModel, held_out: dict[str, np.ndarray], n: int, path: Path, columns: int = 8) -> None:
    """Write a PNG of `n` held-out pictures per source, evenly spaced, each above its reconstruction.

    The smallest are shown at twice their size, the others as large as these.
    """
    strips = []
    shown = 2 * min((pixels.shape[1] for pixels in held_out.values()), default=0)
    for name, pixels in held_out.items():
        tokenizer = ImageTokenizer(_at_size(model, pixels.shape[1]), next(model.parameters()).device)
        chosen = pixels[np.linspace(0, len(pixels) - 1, min(n, len(pixels))).astype(int)]
        again = tokenizer.decode_pixels(tokenizer.encode_pixels(chosen))
        size = chosen.shape[1]
        for start in range(0, len(chosen), columns):
            strip = np.full((2 * size, columns * size, 3), 128, dtype=np.uint8)
            for i, pair in enumerate(zip(chosen[start:], again[start:], strict=True)):
                if i < columns:
                    strip[:, i * size : (i + 1) * size] = np.concatenate(pair)
            image = Image.fromarray(strip).resize((columns * shown, 2 * shown), Image.Resampling.NEAREST)
            ImageDraw.Draw(image).text((2, 2), name, fill="red")
            strips.append(np.asarray(image))
    _atomic(path, lambda temporary: Image.fromarray(np.concatenate(strips)).save(temporary, format="PNG"))


def read_pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every picture in a folder (recursively) or a tar, sorted by name; nothing is unpacked.

    ValueError if `path` is neither.
    """
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            yield str(file.relative_to(path)), file.read_bytes()
        return
    members = []
    for member in tar_members(path):
        if isinstance(member, Broken):
            print(f"train_vq: {member.place} left out: {member.reason}", flush=True)
        elif member.name.lower().endswith(SUFFIXES):
            members.append(member)
    if not members:
        raise ValueError(
            f"got {path}, need a folder or an uncompressed tar file of pictures: correct train_paths or val_paths"
        )
    for member in sorted(members, key=lambda m: m.name):
        yield member.name, read_slice(path, member.offset, member.size)


def _at_size(model: VqModel, size: int) -> VqModel:
    """The same weights for pictures of another size."""
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, resolution=size)
    return other


def _players(config: TrainVqConfig) -> Players:
    """Fresh players, a function of the seed."""
    torch.manual_seed(config.seed)
    model = VqModel(config.model).to(config.device)
    codebook = model.quantize.embedding.weight.detach()
    ema = empty_state(codebook)
    if config.init_from is not None:
        _start_from(model, config.init_from, config.seed)
        vectors = config.batch_size * min(config.picture_sizes) ** 2 // config.model.factor**2
        ema.counts.fill_(vectors / config.model.n_embed)  # as if every code had been used alike so far
        ema.totals.copy_(codebook * ema.counts[:, None])
    adversary = None
    if config.discriminator_weight > 0:
        judge = PatchDiscriminator().to(config.device)
        settings = _optim(config, config.discriminator_lr)
        adversary = Adversary(judge, build_optimizer(judge.named_parameters(), settings))
    return Players(
        model,
        build_optimizer(model.named_parameters(), _optim(config, config.lr)),
        ema,
        PerceptualLoss().to(config.device) if config.perceptual_weight > 0 else None,
        adversary,
    )


def _start_from(model: VqModel, folder: Path, seed: int) -> None:
    """Load an asset's weights into `model`; a larger code book holds the asset's several times, nearly."""
    weights = load_vq(folder).state_dict()
    book = weights[_BOOK]
    own = model.state_dict()
    n = own[_BOOK].shape[0]
    if n % book.shape[0] or any(own[name].shape != weights[name].shape for name in weights.keys() - {_BOOK}):
        raise ValueError(
            f"got an asset {folder} of another shape, need the model's but for n_embed, which must be a multiple of "
            f"its {book.shape[0]}: take the settings of its vqgan.json"
        )
    spread = book.repeat(n // book.shape[0], 1)
    noise = torch.randn(spread.shape, generator=torch.Generator().manual_seed(seed))
    noise[: book.shape[0]] = 0
    weights[_BOOK] = spread + _SPLIT * book.std(0) * noise
    model.load_state_dict(weights)


def _state(players: Players) -> dict[str, Any]:
    """The players' tensors, as checkpoints hold them; loading into them loads the players."""
    state = {
        "model": model_state(players.model),
        "optimizer": optimizer_state(players.model, players.optimizer),
        "ema": players.ema._asdict(),
    }
    if players.adversary is not None:
        state["discriminator"] = model_state(players.adversary.model)
        state["discriminator_optimizer"] = optimizer_state(*players.adversary)
    return state


def _update(config: TrainVqConfig, players: Players, x: Tensor, step: int) -> dict[str, Tensor | float]:
    """One step of both players on pictures `x` (n, 3, s, s) in [-1, 1]; the row of metrics."""
    model, adversary = players.model, players.adversary if step >= config.discriminator_start else None
    bypass = step < config.quantize_start
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with autocast():
        z = model.features(x)
        quantized = model.quantize(z)
        x_hat = model.decode(z if bypass else quantized.quantized)
        picture = picture_gradient(
            x_hat,
            x,
            model.decoder.conv_out.weight,
            players.perceptual,
            adversary.model if adversary is not None else None,
            perceptual_weight=config.perceptual_weight,
            discriminator_weight=config.discriminator_weight,
            average_=average_,
        )
    rate = learning_rate(step, config.steps, _optim(config, config.lr))
    set_learning_rate(players.optimizer, rate)
    players.optimizer.zero_grad(set_to_none=True)
    weight = 0.0 if bypass else config.quantizer_weight
    torch.autograd.backward([x_hat, weight * quantized.loss], [picture.gradient.to(x_hat.dtype), None])
    average_([p.grad for p in model.parameters() if p.grad is not None])
    norm = clip_(model.parameters(), config.clip_norm)
    players.optimizer.step()
    codes = gather(quantized.codes.flatten())
    usage, perplexity = code_statistics(codes, config.model.n_embed)
    if config.model.ema and not bypass:
        update_codebook(
            model.quantize.embedding.weight,
            players.ema,
            gather(z.detach().float().permute(0, 2, 3, 1).flatten(0, 2)),
            codes,
            decay=config.ema_decay,
            dead_below=config.dead_below if step < config.restart_until * config.steps else 0.0,
            generator=torch.Generator(x.device).manual_seed(config.seed * 2**32 + step),
        )
    judged = x.new_zeros(())
    if adversary is not None:
        schedule = _optim(config, config.discriminator_lr)
        set_learning_rate(adversary.optimizer, learning_rate(step, config.steps, schedule))
        with autocast():
            judged = hinge_loss(adversary.model(x), adversary.model(x_hat.detach()))
        adversary.optimizer.zero_grad(set_to_none=True)
        judged.backward()
        average_([p.grad for p in adversary.model.parameters() if p.grad is not None])
        adversary.optimizer.step()
    return {
        "l1": picture.l1,
        "perceptual": picture.perceptual,
        "quantizer": quantized.loss.detach(),
        "adversarial": picture.adversarial,
        "adaptive": picture.adaptive,
        "discriminator": judged.detach(),
        "grad_norm": norm,
        "usage": usage,
        "perplexity": perplexity,
        "lr": rate,
    }


class _Order:
    """Picture numbers of each step: one seeded permutation per epoch, batches run across the seams."""

    def __init__(self, index: np.ndarray, seed: int):
        self.index, self.seed, self.epoch, self.shuffled = index, seed, -1, index

    def batch(self, step: int, size: int) -> np.ndarray:
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self.index))
            if epoch != self.epoch:
                self.epoch = epoch
                self.shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.index)
            chosen.append(self.shuffled[place])
        return np.array(chosen)


def _augment(pixels: np.ndarray, config: TrainVqConfig, step: int) -> np.ndarray:
    """Mirrored and shifted copies of `pixels` uint8 (n, s, s, 3); the border is repeated outwards."""
    random = np.random.default_rng((config.seed, 1, step))
    n, size, r = len(pixels), pixels.shape[1], config.shift
    mirror = random.random(n) < (0.5 if config.flip else 0.0)
    offset = random.integers(0, 2 * r + 1, (n, 2))
    padded = np.pad(pixels, ((0, 0), (r, r), (r, r), (0, 0)), mode="edge")
    result = np.stack([p[y : y + size, x : x + size] for p, (y, x) in zip(padded, offset, strict=True)])
    result[mirror] = result[mirror, :, ::-1]
    return result


def collect(config: TrainVqConfig, size: int) -> tuple[dict[str, tuple[np.ndarray, int]], dict[str, np.ndarray]]:
    """Training pictures with their copies per epoch, and held-out pictures, by source; uint8 (n, size, size, 3)."""
    train, held_out = {}, {}
    drawn = max(size, EmojiConfig.size)  # vector pictures: no smaller than they are trained
    vendors = (EmojiConfig("twemoji"), config.twemoji), (EmojiConfig("openmoji", size=drawn), config.openmoji)
    for emoji, copies in vendors:
        if copies:
            vendor = emoji.vendor
            sides: tuple[list, list] = ([], [])
            for points, name, path in emoji_files(emoji):
                sides[is_held_out(concept_key(name))].append((points, path))
            for side, listing in zip(("train", "val"), sides, strict=True):
                stamp = [f"{points} {path.stat().st_size}" for points, path in listing]
                pictures = ((points, read_picture(path, emoji.size)) for points, path in listing)
                part = _cached(config, size, f"{vendor}-{side}", stamp, pictures)
                if side == "train":
                    train[vendor] = (part, copies)
                else:
                    held_out[vendor] = part
    for path in config.train_paths:
        train[str(path)] = (_cached(config, size, f"{path.stem}-train", _stamp(path), read_pictures(path)), 1)
    for path in config.val_paths:
        name = path.stem if path.stem not in held_out else str(path)
        held_out[name] = _cached(config, size, f"{path.stem}-val", _stamp(path), read_pictures(path))
    if not held_out:
        raise ValueError(
            "got no held-out pictures, need some to measure the tokenizer: give val_paths or use the emoji"
        )
    return train, held_out


def _source_ranges(train: dict[str, tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    start = 0
    for part, copies in train.values():
        yield np.arange(start, start + len(part)), copies
        start += len(part)


def _stamp(path: Path) -> list[str]:
    """What cached pictures of a folder or tar depend on: names, sizes and times of the files."""
    if not path.exists():
        raise ValueError(f"got {path}, need a folder or a tar file of pictures: correct train_paths or val_paths")
    files = sorted(path.rglob("*")) if path.is_dir() else [path.resolve()]
    return [f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]


def _cached(
    config: TrainVqConfig, size: int, name: str, stamp: list[str], pictures: Iterable[tuple[str, bytes]]
) -> np.ndarray:
    """Preprocessed pictures uint8 (n, s, s, 3), read once and cached; unreadable ones are reported."""
    key = hashlib.sha256(json.dumps(["moma-vq-1", size, config.fit, stamp]).encode()).hexdigest()[:16]
    path = config.cache / f"{name}-{size}-{key}.npy"
    if not path.is_file():
        kept, skipped = [], []
        for file, data in pictures:
            try:
                kept.append(preprocess(open_image(data, file), size, config.fit))
            except ValueError as error:
                skipped.append(str(error))
        if skipped:
            print(f"train_vq: {name}: {len(skipped)} pictures left out, first: {skipped[0]}", flush=True)
        if not kept:
            raise ValueError(f"got no readable picture for {name}, need at least one of {SUFFIXES}: check its path")
        path.parent.mkdir(parents=True, exist_ok=True)
        _atomic(path, lambda temporary: _write_array(temporary, np.stack(kept)))
    return np.load(path, allow_pickle=False)


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save on a name would add .npy to the temporary one
        np.save(file, array, allow_pickle=False)


def _atomic(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


def _optim(config: TrainVqConfig, lr: float) -> OptimConfig:
    return OptimConfig(
        lr=lr,
        end_lr=min(config.end_lr, lr),
        schedule="cosine",
        warmup=Duration(steps=min(config.warmup_steps, config.steps)),
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def _identity(config: TrainVqConfig) -> dict[str, Any]:
    """The settings that decide the weights, as JSON would give them back."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    return json.loads(json.dumps(fields, default=str))


def _resume(config: TrainVqConfig, state: dict[str, Any]) -> dict[str, Any]:
    """Load the newest checkpoint into `state`, in place; its meta, or nothing."""
    folder = checkpoint.latest(config.out / "checkpoints")
    if folder is None:
        return {}
    meta, want = checkpoint.read_meta(folder), _identity(config)
    have = meta["config"]
    changed = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
    if changed:
        raise ValueError(
            f"got a checkpoint in {config.out} of a run with other settings ({', '.join(changed)}), need the "
            "same settings to resume: restore them, or give another `out`"
        )
    checkpoint.load(folder, state)
    return meta
