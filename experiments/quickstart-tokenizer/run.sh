#!/usr/bin/env bash
# The quick start's dense training with several image tokenizers, three paired seeds each, and how near the pictures it
# draws come to real held-out ones (not to reconstructions, so that the tokenizer's own loss of detail counts).
#   experiments/quickstart-tokenizer/run.sh [OUT] [TOKENIZER ...]       the same command again goes on
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) out=${1:-runs/quickstart-tokenizer}
shift || true
tokenizers=("$@")
[ $# -gt 0 ] || tokenizers=(small small4k)
for tokenizer in "${tokenizers[@]}"; do
  moma prepare tokenizer="$tokenizer" name="emoji-$tokenizer"
done
train() { # tokenizer, seed
  moma train feed_forward=dense tokenizer="$1" data.corpus="corpora/emoji-$1" parallel.threads=1 duration.tokens=9.6e5 \
    seed.data="$2" seed.init="$2" run_dir="$out/$1-s$2" > "$out/$1-s$2.log" 2>&1
}
export -f train && export out && mkdir -p "$out"
for seed in 0 1 2; do for tokenizer in "${tokenizers[@]}"; do echo "$tokenizer $seed"; done; done |
  xargs -P 2 -L 1 bash -c 'train "$@"' _
python - "$out" "$here/results" "${tokenizers[@]}" <<'PY'
import json, sys
from pathlib import Path

import numpy as np
import torch

from moma.data.sources.emoji import EmojiConfig, emoji_files, read_picture
from moma.data.sources.split import concept_key, is_held_out
from moma.evaluate import Artist
from moma.evaluation.runs import load_run
from moma.tokenizer.image import ImageTokenizer, open_image, preprocess
from moma.vqgan.metrics import PictureFeatures, kernel_distance, picture_features

torch.set_num_threads(2)
out, results, *tokenizers = sys.argv[1:]
network, n = PictureFeatures(), 200


def originals(held_out):
    return np.stack([
        preprocess(open_image(read_picture(path, 72), name), 64)
        for vendor in ("twemoji", "openmoji")
        for _, name, path in emoji_files(EmojiConfig(vendor))
        if is_held_out(concept_key(name)) == held_out
    ])


held, train = originals(True), originals(False)
train = train[np.random.default_rng(0).permutation(len(train))[:n]]
real = picture_features(held, network)


def kid(pixels):
    value, error = kernel_distance(picture_features(pixels, network), real)
    return {"kid": round(value, 4), "se": round(error, 4)}


found = {"n": n, "n_real": len(held), "training pictures": kid(train)}
for name in tokenizers:
    rows = []
    for seed in range(3):
        run = load_run(Path(out) / f"{name}-s{seed}", "cpu")
        artist = Artist(run, run.corpus, n, torch.device("cpu"))
        codes = artist.draw()
        drawn = np.stack([np.asarray(p.convert("RGB")) for p in artist.image.decode(codes)])
        *_, last = (json.loads(line) for line in open(Path(out) / f"{name}-s{seed}/metrics.jsonl") if "val_loss" in line)
        rows.append({**kid(drawn), **{key: round(last[key], 4) for key in ("val_loss_text", "val_loss_image")}})
        print(name, seed, rows[-1], flush=True)
    image = ImageTokenizer.load(artist.run.tokenizer, "cpu")
    again = image.decode_pixels(image.encode_pixels(train))
    found[name] = {"seeds": rows, "reconstructed training pictures": kid(again)}
first, *others = tokenizers
for name in others:
    differences = [b["kid"] - a["kid"] for a, b in zip(found[first]["seeds"], found[name]["seeds"], strict=True)]
    mean, spread = np.mean(differences), np.std(differences, ddof=1)
    found[f"{name} - {first}"] = {"kid": round(float(mean), 4), "half_95": round(float(4.303 * spread / 3**0.5), 4)}
Path(results, "kid.json").write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
PY
