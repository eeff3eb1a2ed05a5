#!/usr/bin/env bash
# Stage 1.5: multimodal pre-training on self-generated, curated records; every part trains.
#   reads   MM_PROJECTOR_CHECKPOINT (a checkpoint folder), DATA_PATH (records, comma-separated)
#   writes  OUTPUT_DIR, default model_weight/$EXPERIMENT_NAME
#   usage   EXPERIMENT_NAME=pretrained MM_PROJECTOR_CHECKPOINT=model_weight/align DATA_PATH=runs/curated/captions/chosen.jsonl,runs/curated/reasoning/chosen.jsonl \
#           bash training_scripts/uhdv1-finetune-qwen-stage15-sft.sh [any training flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${EXPERIMENT_NAME:?a name for this run, for example EXPERIMENT_NAME=pretrained}"
: "${DATA_PATH:?curated records from quality_evaluation, for example DATA_PATH=runs/curated/captions/chosen.jsonl,runs/curated/reasoning/chosen.jsonl}"
: "${MM_PROJECTOR_CHECKPOINT:?the checkpoint folder of stage 1, or a published mm_projector.bin, for example MM_PROJECTOR_CHECKPOINT=model_weight/align}"
require_path MM_PROJECTOR_CHECKPOINT
rename_variable FINETUNE_RANK_BATCH FINETUNE_BATCH
batch_flags 128

# A published mm_projector.bin becomes a checkpoint folder first, with the language model and CLIP it was trained for.
start=$MM_PROJECTOR_CHECKPOINT
if [[ -f "$start" ]]; then
    : "${LLM_CKPT_DIR:?with a mm_projector.bin: the language model folder, for example LLM_CKPT_DIR=model_weight/Qwen2-7B-Instruct}"
    : "${CLIP_CKPT_DIR:?with a mm_projector.bin: the CLIP folder, for example CLIP_CKPT_DIR=model_weight/clip-vit-large-patch14-336}"
    start=${OUTPUT_DIR:-model_weight/$EXPERIMENT_NAME}-init
    if [[ "$NODE_RANK" == 0 ]]; then
        single llava.model.assemble --vision "$CLIP_CKPT_DIR" --language "$LLM_CKPT_DIR" --output "$start" \
            --projector "$MM_PROJECTOR_CHECKPOINT" --resampler_grid "${RESAMPLER_GRID:-12}" \
            --dtype "$([[ "$gpus" -gt 0 ]] && echo bfloat16 || echo float32)"
    fi
    wait_for "$start"
fi

launch llava.train.sft \
    --model_name_or_path "$start" \
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
