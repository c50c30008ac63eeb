#!/usr/bin/env bash
# openstax pages -> a corpus with two sources: pictures with their captions, and the pages' prose.
#   experiments/rehearsal/prepare.sh PAGES [CORPORA]     PAGES: folder with {train,val}.{jsonl.xz,tar}
set -euo pipefail
moma prepare data=openstax256 folder="$1" corpora="${2:-corpora}" name=openstax tokenizer=small sources.pairs.order=picture_first
