#!/usr/bin/env bash
# Stage 2: visual instruction tuning; every part trains.
#   reads   PREV_STAGE_CHECKPOINT (a checkpoint folder), DATA_PATH (records, comma-separated)
#   writes  OUTPUT_DIR, default model_weight/$EXPERIMENT_NAME
#   usage   EXPERIMENT_NAME=sicog PREV_STAGE_CHECKPOINT=model_weight/pretrained DATA_PATH=data/llava_uhd_sft_858k.json \
#           bash training_scripts/uhdv1-finetune-qwen-stage2-sft.sh [any training flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${EXPERIMENT_NAME:?a name for this run, for example EXPERIMENT_NAME=sicog}"
: "${DATA_PATH:?instruction records, for example DATA_PATH=data/llava_uhd_sft_858k.json}"
: "${PREV_STAGE_CHECKPOINT:?the checkpoint folder of stage 1.5 (of stage 1 for the base model), for example PREV_STAGE_CHECKPOINT=model_weight/pretrained}"
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
