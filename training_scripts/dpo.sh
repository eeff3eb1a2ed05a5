#!/usr/bin/env bash
# Preference training (DPO) of a warmed-up generator, before it generates. The reference is where training starts.
#   reads   PREV_STAGE_CHECKPOINT (a checkpoint folder), DATA_PATH (pairs of `python -m quality_evaluation.pairs`)
#   writes  OUTPUT_DIR, default model_weight/$EXPERIMENT_NAME; the paper's learning rate, epochs and batch are not known to us
#   usage   EXPERIMENT_NAME=reasoning-dpo PREV_STAGE_CHECKPOINT=model_weight/reasoning DATA_PATH=runs/pairs/pairs.jsonl \
#           bash training_scripts/dpo.sh [any training flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${EXPERIMENT_NAME:?a name for this run, for example EXPERIMENT_NAME=reasoning-dpo}"
: "${DATA_PATH:?preference pairs of quality_evaluation.pairs, for example DATA_PATH=runs/pairs/pairs.jsonl}"
: "${PREV_STAGE_CHECKPOINT:?the warmed-up checkpoint folder, for example PREV_STAGE_CHECKPOINT=model_weight/reasoning}"
require_path PREV_STAGE_CHECKPOINT
batch_flags 128

launch llava.train.dpo \
    --model_name_or_path "$PREV_STAGE_CHECKPOINT" \
    --train_parts vision,projector,language \
    --data_path "$DATA_PATH" \
    ${IMAGE_FOLDER:+--image_folder "$IMAGE_FOLDER"} \
    --loss "${DPO_LOSS:-sigmoid}" \
    --beta "${DPO_BETA:-0.1}" \
    --gamma "${DPO_GAMMA:-1}" \
    --label_smoothing "${DPO_LABEL_SMOOTHING:-0}" \
    --learning_rate "${DPO_LEARNING_RATE:-5e-7}" \
    --per_device_train_batch_size "${DPO_BATCH:-4}" \
    "${batch[@]}" \
    --num_train_epochs "${NUM_TRAIN_EPOCHS:-1}" \
    --lr_scheduler_type cosine \
    --warmup_steps 0.1 \
    --weight_decay 0 \
    --max_grad_norm 1 \
    --max_length "${MAX_LENGTH:-4096}" \
    --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}" \
    --save_steps "${SAVE_STEPS:-500}" \
    --seed "${SEED:-0}" \
    --report_to "${REPORT_TO:-none}" \
    ${engine[@]+"${engine[@]}"} \
    --output_dir "${OUTPUT_DIR:-model_weight/$EXPERIMENT_NAME}" \
    "$@"
