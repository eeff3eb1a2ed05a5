#!/usr/bin/env bash
# Step 2, perception: caption candidates for unlabelled images.
#   reads   MODEL_PATH (checkpoint folder; or ENDPOINT and MODEL, a chat-completions server), DATA_PATH (records with images)
#   writes  OUTPUT_DIR/candidates.jsonl, default runs/<data>_<PROMPT>_t<TEMPERATURE>_b<BEAMS>_p<TOP_P>
#   usage   MODEL_PATH=model_weight/perception DATA_PATH=data/unlabelled.json PROMPT=cod-default,default N_CANDIDATES=2,1 \
#           bash recap_scripts/recap_inference.sh [any flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

if [[ -z "${ENDPOINT:-}" ]]; then : "${MODEL_PATH:?the warmed-up checkpoint folder, for example MODEL_PATH=model_weight/perception, or ENDPOINT=http://127.0.0.1:8000/v1 MODEL=name}"; fi
: "${DATA_PATH:?records with images, for example DATA_PATH=data/unlabelled.json}"
if [[ -n "${MODEL_PATH:-}" ]]; then require_path MODEL_PATH; fi
array_rank
PROMPT=${PROMPT:-cod-default} # of cod-default, cod-conv and default, comma-separated
if [[ -n "${ENDPOINT:-}" ]]; then # one process asks the server, as often as it may
    NPROC_PER_NODE=1
    BATCH_SIZE=${BATCH_SIZE:-64}
else
    BATCH_SIZE=${BATCH_SIZE:-8}
fi
TEMPERATURE=${TEMPERATURE:-0.7}
BEAMS=${BEAMS:-1}
TOP_P=${TOP_P:-0.9}
name=$(basename "${DATA_PATH%.*}")_${PROMPT}_t${TEMPERATURE}_b${BEAMS}_p${TOP_P}

launch llava.generate.recaption \
    ${MODEL_PATH:+--model_name_or_path "$MODEL_PATH"} \
    ${ENDPOINT:+--endpoint "$ENDPOINT" --model "${MODEL:-}"} \
    --data_path "$DATA_PATH" \
    ${IMAGE_FOLDER:+--image_folder "$IMAGE_FOLDER"} \
    --prompt "$PROMPT" \
    --n_candidates "${N_CANDIDATES:-1}" \
    --temperature "$TEMPERATURE" \
    --num_beams "$BEAMS" \
    --top_p "$TOP_P" \
    --max_new_tokens "${MAX_NEW_TOKENS:-1200}" \
    --batch_size "$BATCH_SIZE" \
    --round "${ROUND:-1}" \
    --seed "${SEED:-0}" \
    --output_dir "${OUTPUT_DIR:-runs/$name}" \
    "$@"
