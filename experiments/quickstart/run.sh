#!/usr/bin/env bash
# The quick start from a fresh clone; results as in results/.
set -euo pipefail
make quickstart
