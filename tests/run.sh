#!/usr/bin/env bash
# Set up .venv, then lint and test.   usage: bash tests/run.sh [--slow] [pytest arguments]
#   --slow   also the tests marked slow (DeepSpeed, the longer cycles, servers); installs the extras `train` and `demo`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == --slow ]]; then
    shift
    bash training_scripts/setup.sh test train demo
    marks="not gpu"
else
    bash training_scripts/setup.sh test
    marks="not slow and not gpu"
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check -q .
.venv/bin/shellcheck --severity=style --exclude=SC1091 .ci/run tests/*.sh training_scripts/*.sh recap_scripts/*.sh \
    quality_evaluation/scripts/*.sh training_data_annotation/*.sh
.venv/bin/python -m pytest -n 2 -m "$marks" "$@"
