#!/usr/bin/env bash
# Step 1, perception: captioned records -> Chain-of-Description and direct-description records, through an annotator.
#   reads   ORIGINAL_CAPTION_FILE, IMAGE_DIR; OPENAI_API_KEY, OPENAI_BASE_URL (any chat-completions server)
#   writes  OUTPUT_COD_DIR/cod.jsonl, OUTPUT_DD_DIR/dd.jsonl
#   usage   ORIGINAL_CAPTION_FILE=data/ALLaVA-Caption-VFLAN-4V.json IMAGE_DIR=data/allava OUTPUT_COD_DIR=runs/annotated/cod \
#           OUTPUT_DD_DIR=runs/annotated/dd bash training_data_annotation/revise_cod.sh [--limit 35000] [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${ORIGINAL_CAPTION_FILE:?captioned records, for example ORIGINAL_CAPTION_FILE=data/ALLaVA-Caption-VFLAN-4V.json}"
: "${IMAGE_DIR:?root of their image paths, for example IMAGE_DIR=data/allava}"
: "${OUTPUT_COD_DIR:?folder for the step-by-step descriptions, for example OUTPUT_COD_DIR=runs/annotated/cod}"
: "${OUTPUT_DD_DIR:?folder for the direct descriptions, for example OUTPUT_DD_DIR=runs/annotated/dd}"

single training_data_annotation.annotate_captions \
    --data_path "$ORIGINAL_CAPTION_FILE" \
    --image_folder "$IMAGE_DIR" \
    ${OPENAI_BASE_URL:+--base_url "$OPENAI_BASE_URL"} \
    --model "${ANNOTATOR_MODEL:-gpt-4o}" \
    ${REQUESTS_PER_MINUTE:+--requests_per_minute "$REQUESTS_PER_MINUTE"} \
    ${PRICE_INPUT:+--price_input "$PRICE_INPUT"} \
    ${PRICE_OUTPUT:+--price_output "$PRICE_OUTPUT"} \
    ${MAX_COST:+--max_cost "$MAX_COST"} \
    --temperature 0.2 \
    --max_tokens 2048 \
    --output_cod_dir "$OUTPUT_COD_DIR" \
    --output_dd_dir "$OUTPUT_DD_DIR" \
    "$@"
