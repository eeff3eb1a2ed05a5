#!/usr/bin/env bash
# Evaluate a checkpoint on VLMEvalKit-format TSVs by exact match.
#   reads   MODEL_PATH (checkpoint folder), DATA_PATH (TSV files, comma-separated, or a folder of them)
#   writes  OUTPUT_DIR/results.json and OUTPUT_DIR/predictions/, default runs/evaluation/<model's name>
#   usage   MODEL_PATH=model_weight/sicog DATA_PATH=data/MMStar.tsv bash training_scripts/evaluate.sh [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${MODEL_PATH:?the checkpoint folder to evaluate, for example MODEL_PATH=model_weight/sicog}"
: "${DATA_PATH:?TSV files or their folder, for example DATA_PATH=data/MMStar.tsv}"
require_path MODEL_PATH

single llava.eval.benchmarks \
    --model_name_or_path "$MODEL_PATH" \
    --data_path "$DATA_PATH" \
    --batch_size "${BATCH_SIZE:-16}" \
    --max_new_tokens "${MAX_NEW_TOKENS:-64}" \
    --output_dir "${OUTPUT_DIR:-runs/evaluation/$(basename "$MODEL_PATH")}" \
    "$@"
