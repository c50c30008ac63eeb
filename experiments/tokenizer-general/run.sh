#!/usr/bin/env bash
# Trains the image tokenizer of tokenizers/{small4k,openstax16k,openstax32k} and measures it beside that of tokenizers/small.
#   PICTURES=FOLDER experiments/tokenizer-general/run.sh
# FOLDER: train.tar and val.tar, pictures of OpenStax textbooks at 256 px (CC BY 4.0). One thread, an hour and a half on a busy
# core; the same command again resumes.
set -euo pipefail
: "${PICTURES:?set PICTURES to the folder with train.tar and val.tar}"
here=$(cd "$(dirname "$0")" && pwd) run=runs/tokenizer-general
moma train_vq out=$run threads=1 log.interval=20 eval_every=1000 checkpoint_every=500 \
  'sizes=[64,128]' init_from=tokenizers/small model.n_embed=4096 quantize_start=0 ema_decay=0.99 lr=5e-4 steps=12000 \
  twemoji=2 openmoji=2 shift=6 "train_paths=[$PICTURES/train.tar]" "val_paths=[$PICTURES/val.tar]"
[ -d tokenizers/small4k ] || moma train_bpe out=tokenizers/small4k image_codes=4096 # the text half of small, bit for bit
for asset in small4k openstax16k openstax32k; do
  cp $run/export/vqgan.* tokenizers/$asset/
done
sed -i 's/"resolution": 64/"resolution": 128/' tokenizers/openstax{16,32}k/vqgan.json # the same weights, larger pictures
for asset in small4k openstax16k openstax32k; do
  (cd tokenizers/$asset && sha256sum $(ls -I SHA256SUMS) > SHA256SUMS)
done
cp $run/result.json $run/metrics.jsonl "$here/results/"
python -c "from PIL import Image; Image.open('$run/grid.png').convert('RGB').save('$here/reconstructions.jpg', quality=85, optimize=True)"
python - "$PICTURES/val.tar" "$here/results/compare.json" <<'PY'
import json, sys
from dataclasses import replace
from pathlib import Path

import torch

from moma.train_vq import TrainVqConfig, collect, evaluate_vq
from moma.vqgan.metrics import PictureFeatures
from moma.vqgan.model import load_vq

torch.set_num_threads(1)
val, out = map(Path, sys.argv[1:])
network, found = PictureFeatures(), {}
for size in (64, 128):
    _, held_out = collect(replace(TrainVqConfig(), val_paths=(val,)), size)
    for name in ("small", "small4k"):
        rows = evaluate_vq(load_vq(Path("tokenizers") / name), held_out, features=network)
        found[f"{name} at {size} px"] = {key: round(value, 4) for key, value in rows.items()}
out.write_text(json.dumps(found, indent=1) + "\n")
PY
