#!/usr/bin/env bash
# Step 3, reasoning: pool reasoning candidates by id, keep the most consistent one of each record above THRESHOLD.
#   reads   RAW_DATASET (candidate files, comma-separated); ENCODER_MODEL_NAME_OR_PATH (hashing, a
#           sentence-transformers folder, or the address of an embeddings server with ENCODER_MODEL)
#   writes  OUTPUT_DIR/chosen.jsonl (chosen_0.85.jsonl with THRESHOLD=0.8,0.85), scored.jsonl, preference.jsonl, default runs/curated/reasonings[_<MODEL_NAME_OR_PATH's name>]
#   usage   RAW_DATASET=runs/a/candidates.jsonl,runs/b/candidates.jsonl bash quality_evaluation/scripts/reasoning_quality_eval.sh [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source training_scripts/launch.sh

: "${RAW_DATASET:?candidate files, for example RAW_DATASET=runs/a/candidates.jsonl,runs/b/candidates.jsonl}"
IFS=, read -r -a candidates <<<"$RAW_DATASET"
generator=${MODEL_NAME_OR_PATH:+_$(basename "$MODEL_NAME_OR_PATH")}

launch quality_evaluation.curate \
    --candidates "${candidates[@]}" \
    --kind reasoning \
    --encoder "${ENCODER_MODEL_NAME_OR_PATH:-hashing}" \
    ${ENCODER_MODEL:+--encoder_model "$ENCODER_MODEL"} \
    --threshold "${THRESHOLD:-0.8}" \
    --seed "${SEED:-0}" \
    --output_dir "${OUTPUT_DIR:-runs/curated/reasonings$generator}" \
    "$@"
