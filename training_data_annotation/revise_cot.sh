#!/usr/bin/env bash
# Step 1, reasoning: LLaVA-CoT's tagged answers -> four-step chain-of-thought records and short-answer records.
#   reads   ORIGINAL_COT_FILE
#   writes  OUTPUT_COT_DIR/cot.jsonl, OUTPUT_SHORT_DIR/short.jsonl
#   usage   ORIGINAL_COT_FILE=data/LLaVA-CoT-100k/train.jsonl OUTPUT_COT_DIR=runs/annotated/cot \
#           OUTPUT_SHORT_DIR=runs/annotated/short bash training_data_annotation/revise_cot.sh [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${ORIGINAL_COT_FILE:?tagged records, for example ORIGINAL_COT_FILE=data/LLaVA-CoT-100k/train.jsonl}"
: "${OUTPUT_COT_DIR:?folder for the step-by-step answers, for example OUTPUT_COT_DIR=runs/annotated/cot}"
: "${OUTPUT_SHORT_DIR:?folder for the short answers, for example OUTPUT_SHORT_DIR=runs/annotated/short}"

single training_data_annotation.convert_reasoning \
    --data_path "$ORIGINAL_COT_FILE" \
    --output_cot_dir "$OUTPUT_COT_DIR" \
    --output_short_dir "$OUTPUT_SHORT_DIR" \
    "$@"
