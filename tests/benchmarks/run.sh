#!/usr/bin/env bash
# Every speed comparison, one thread, equality asserted before each.   usage: bash tests/benchmarks/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for part in model training generation client curation; do .venv/bin/python -m "tests.benchmarks.$part"; done
