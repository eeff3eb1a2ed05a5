#!/usr/bin/env bash
# Stage 1: modality alignment. Only the projector trains, on captions, with each image as overview only (no slices).
#   reads   LLM_CKPT_DIR and CLIP_CKPT_DIR (published folders), DATA_PATH (records, comma-separated)
#   writes  OUTPUT_DIR, default model_weight/$EXPERIMENT_NAME; the checkpoint it starts from beside it, as ...-init
#   usage   EXPERIMENT_NAME=align LLM_CKPT_DIR=model_weight/Qwen2-7B-Instruct \
#           CLIP_CKPT_DIR=model_weight/clip-vit-large-patch14-336 DATA_PATH=data/blip_laion_cc_sbu_558k.json \
#           bash training_scripts/uhdv1-pretrain-qwen-stage1-align.sh [any training flag]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

: "${EXPERIMENT_NAME:?a name for this run, for example EXPERIMENT_NAME=align}"
: "${DATA_PATH:?alignment records, for example DATA_PATH=data/blip_laion_cc_sbu_558k.json}"
: "${LLM_CKPT_DIR:?the language model folder, for example LLM_CKPT_DIR=model_weight/Qwen2-7B-Instruct}"
: "${CLIP_CKPT_DIR:?the CLIP folder, for example CLIP_CKPT_DIR=model_weight/clip-vit-large-patch14-336}"
require_path LLM_CKPT_DIR
require_path CLIP_CKPT_DIR
rename_variable PRETRAIN_RANK_BATCH PRETRAIN_BATCH
batch_flags 256
output=${OUTPUT_DIR:-model_weight/$EXPERIMENT_NAME}

if [[ "$NODE_RANK" == 0 ]]; then
    single llava.model.assemble --vision "$CLIP_CKPT_DIR" --language "$LLM_CKPT_DIR" --output "$output-init" \
        --projector_type "${PROJECTOR_TYPE:-spatial_resampler}" --resampler_grid "${RESAMPLER_GRID:-12}" \
        --dtype "$([[ "$gpus" -gt 0 ]] && echo bfloat16 || echo float32)"
fi
wait_for "$output-init"

launch llava.train.sft \
    --model_name_or_path "$output-init" \
    --train_parts projector \
    --overview_only True \
    --data_path "$DATA_PATH" \
    ${IMAGE_FOLDER:+--image_folder "$IMAGE_FOLDER"} \
    --learning_rate "${PRETRAIN_LEARNING_RATE:-2e-4}" \
    --per_device_train_batch_size "${PRETRAIN_BATCH:-8}" \
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
    --output_dir "$output" \
    "$@"
