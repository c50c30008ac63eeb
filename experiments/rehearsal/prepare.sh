#!/usr/bin/env bash
# openstax pages -> a corpus with two sources: pictures with their captions, and the pages' prose.
#   experiments/rehearsal/prepare.sh PAGES [CORPORA]     PAGES: folder with {train,val}.{jsonl.xz,tar}
set -euo pipefail
pages=$1 corpora=${2:-corpora} made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
python - "$pages" "$made" <<'PY'
import json, lzma, sys
pages, made = sys.argv[1:]
for split in ("train", "val"):
    with open(f"{made}/{split}-pairs.jsonl", "w") as pairs, open(f"{made}/{split}-prose.jsonl", "w") as prose:
        for line in lzma.open(f"{pages}/{split}.jsonl.xz", "rt"):
            page = json.loads(line)
            key = page.get("key", page["id"])
            # a picture and its caption are never cut: they must fit a row
            pictures = [s for s in page["segs"] if "i" in s and len(s.get("cap") or "") <= 800]
            for n, picture in enumerate(pictures):
                pairs.write(json.dumps({"id": f"{page['id']}#{n}", "key": key, "segs": [picture]}) + "\n")
            text = [s for s in page["segs"] if "t" in s]
            if text:
                prose.write(json.dumps({"id": page["id"], "key": key, "segs": text}) + "\n")
PY
sources=()
for split in train val; do
  for kind in pairs prose; do
    sources+=("+sources.${kind}_$split={kind: interleaved, documents: $made/$split-$kind.jsonl, pictures: $pages/$split.tar, captions: cap, split: $split, author: OpenStax, licence: CC BY 4.0, url: 'https://openstax.org'}")
  done
done
moma prepare name=openstax corpora="$corpora" '~sources.twemoji' '~sources.openmoji' '~sources.web' '~sources.asv' "${sources[@]}"
