#!/usr/bin/env bash
# Step 2, perception: caption candidates for unlabelled images. Call it once per PROMPT; curation pools the runs.
#   reads   MODEL_PATH (checkpoint folder), DATA_PATH (records with images)
#   writes  OUTPUT_DIR/candidates.jsonl, default runs/<data>_<PROMPT>_t<TEMPERATURE>_b<BEAMS>_p<TOP_P>
#   usage   MODEL_PATH=model_weight/perception DATA_PATH=data/unlabelled.json PROMPT=cod-default N_CANDIDATES=2 \
#           bash recap_scripts/recap_inference.sh [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${MODEL_PATH:?the warmed-up checkpoint folder, for example MODEL_PATH=model_weight/perception}"
: "${DATA_PATH:?records with images, for example DATA_PATH=data/unlabelled.json}"
require_path MODEL_PATH
PROMPT=${PROMPT:-cod-default} # cod-default, cod-conv or default
TEMPERATURE=${TEMPERATURE:-0.7}
BEAMS=${BEAMS:-1}
TOP_P=${TOP_P:-0.9}
name=$(basename "${DATA_PATH%.*}")_${PROMPT}_t${TEMPERATURE}_b${BEAMS}_p${TOP_P}

launch llava.generate.recaption \
    --model_name_or_path "$MODEL_PATH" \
    --data_path "$DATA_PATH" \
    ${IMAGE_FOLDER:+--image_folder "$IMAGE_FOLDER"} \
    --prompt "$PROMPT" \
    --n_candidates "${N_CANDIDATES:-1}" \
    --temperature "$TEMPERATURE" \
    --num_beams "$BEAMS" \
    --top_p "$TOP_P" \
    --max_new_tokens "${MAX_NEW_TOKENS:-1200}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --seed "${SEED:-0}" \
    --output_dir "${OUTPUT_DIR:-runs/$name}" \
    "$@"
