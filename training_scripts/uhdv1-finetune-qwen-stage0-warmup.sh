#!/usr/bin/env bash
# Stage 0: warm-up. The base model learns to describe, or to reason, in steps; every part trains.
#   reads   PREV_STAGE_CHECKPOINT (a checkpoint folder), DATA_PATH (records, comma-separated)
#   writes  OUTPUT_DIR, default model_weight/$EXPERIMENT_NAME
#   usage   EXPERIMENT_NAME=perception PREV_STAGE_CHECKPOINT=model_weight/base DATA_PATH=runs/annotated/cod/cod.jsonl,runs/annotated/dd/dd.jsonl \
#           bash training_scripts/uhdv1-finetune-qwen-stage0-warmup.sh [any training flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${EXPERIMENT_NAME:?a name for this run, for example EXPERIMENT_NAME=perception}"
: "${DATA_PATH:?annotated records from training_data_annotation, for example DATA_PATH=runs/annotated/cod/cod.jsonl,runs/annotated/dd/dd.jsonl}"
: "${PREV_STAGE_CHECKPOINT:?the checkpoint folder of the base model, for example PREV_STAGE_CHECKPOINT=model_weight/base}"
require_path PREV_STAGE_CHECKPOINT
rename_variable FINETUNE_RANK_BATCH FINETUNE_BATCH
batch_flags 128

launch llava.train.sft \
    --model_name_or_path "$PREV_STAGE_CHECKPOINT" \
    --train_parts vision,projector,language \
    --data_path "$DATA_PATH" \
    ${IMAGE_FOLDER:+--image_folder "$IMAGE_FOLDER"} \
    --learning_rate "${FINETUNE_LEARNING_RATE:-2e-5}" \
    --per_device_train_batch_size "${FINETUNE_BATCH:-4}" \
    "${batch[@]}" \
    --num_train_epochs "${NUM_TRAIN_EPOCHS:-1}" \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
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
