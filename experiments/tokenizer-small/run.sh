#!/usr/bin/env bash
# Trains the image tokenizer of tokenizers/small. PICTURES: a folder with train.tar and val.tar, pictures of OpenStax
# textbooks at 256 px (CC BY 4.0). One thread, about 25 minutes on one core; the same command again resumes.
set -euo pipefail
: "${PICTURES:?set PICTURES to the folder with train.tar and val.tar}"
moma train_vq out=runs/tokenizer-small threads=1 log.interval=20 eval_every=250 \
    "train_paths=[$PICTURES/train.tar]" "val_paths=[$PICTURES/val.tar]"
cp runs/tokenizer-small/export/vqgan.* tokenizers/small/
(cd tokenizers/small && sha256sum $(ls -I SHA256SUMS) > SHA256SUMS)
