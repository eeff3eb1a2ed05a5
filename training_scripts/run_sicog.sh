#!/usr/bin/env bash
# The whole cycle: annotate, align, base model, warm-up, generate, curate, pre-train, fine-tune, evaluate, report.
# Called again with the same variables it continues where it stopped; finished stages are recognised and skipped.
#   reads   LLM_CKPT_DIR CLIP_CKPT_DIR            published folders of the language model and CLIP
#           ALIGN_DATA SFT_DATA                    records of stage 1 and stage 2
#           ORIGINAL_CAPTION_FILE ORIGINAL_COT_FILE  the little annotated data (images below IMAGE_FOLDER)
#           UNLABELLED_IMAGES UNLABELLED_QUESTIONS   what the model improves on
#           TEXT_ONLY_DATA (optional)              text-only records mixed into stage 1.5
#           BENCHMARKS                             folder of VLMEvalKit TSVs
#           PREFERENCE=1 (optional)                train the generators by DPO before they generate (paper, DPO variants)
#   writes  runs/$EXPERIMENT_NAME/: one folder per stage, table.md, table.xlsx, report.html
#   usage   see README.md, "Your own data and weights"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${EXPERIMENT_NAME:?a name; everything goes to runs/EXPERIMENT_NAME}"
: "${LLM_CKPT_DIR:?the language model folder, for example LLM_CKPT_DIR=model_weight/Qwen2-7B-Instruct}"
: "${CLIP_CKPT_DIR:?the CLIP folder, for example CLIP_CKPT_DIR=model_weight/clip-vit-large-patch14-336}"
: "${ALIGN_DATA:?alignment records, for example ALIGN_DATA=data/blip_laion_cc_sbu_558k.json}"
: "${SFT_DATA:?instruction records, for example SFT_DATA=data/llava_uhd_sft_858k.json}"
: "${ORIGINAL_CAPTION_FILE:?captioned records, for example ORIGINAL_CAPTION_FILE=data/ALLaVA-Caption-VFLAN-4V.json}"
: "${ORIGINAL_COT_FILE:?tagged records, for example ORIGINAL_COT_FILE=data/LLaVA-CoT-100k/train.jsonl}"
: "${UNLABELLED_IMAGES:?records with images to caption, for example UNLABELLED_IMAGES=data/unlabelled.json}"
: "${UNLABELLED_QUESTIONS:?records with questions to answer, for example UNLABELLED_QUESTIONS=data/questions.json}"
: "${BENCHMARKS:?a folder of VLMEvalKit TSVs, for example BENCHMARKS=data/benchmarks}"
if [[ "${NNODES:-${SLURM_NNODES:-1}}" != 1 ]]; then
    echo "error: run_sicog.sh chains the stages on one node. Fix: on several nodes, run the stage scripts one after another" >&2
    exit 2
fi
export LLM_CKPT_DIR CLIP_CKPT_DIR ORIGINAL_CAPTION_FILE ORIGINAL_COT_FILE
export IMAGE_FOLDER=${IMAGE_FOLDER:-$(dirname "$SFT_DATA")}
if [[ -n "${DRY_RUN:-}" ]]; then export DRY_RUN=print; fi # later stages read what earlier ones have not yet written
work=runs/$EXPERIMENT_NAME
train=training_scripts/uhdv1

step() { echo "--- $*"; }

step "1/9 annotate: Chain-of-Description and chain-of-thought from a little annotated data"
IMAGE_DIR=$IMAGE_FOLDER OUTPUT_COD_DIR=$work/annotated/cod OUTPUT_DD_DIR=$work/annotated/dd \
    bash training_data_annotation/revise_cod.sh
OUTPUT_COT_DIR=$work/annotated/cot OUTPUT_SHORT_DIR=$work/annotated/short \
    bash training_data_annotation/revise_cot.sh

step "2/9 stage 1: align the projector"
OUTPUT_DIR=$work/align DATA_PATH=$ALIGN_DATA bash $train-pretrain-qwen-stage1-align.sh

step "3/9 base model: stage 2 without stage 1.5"
OUTPUT_DIR=$work/base PREV_STAGE_CHECKPOINT=$work/align DATA_PATH=$SFT_DATA bash $train-finetune-qwen-stage2-sft.sh

step "4/9 stage 0: warm up a perception model and a reasoning model"
OUTPUT_DIR=$work/perception PREV_STAGE_CHECKPOINT=$work/base \
    DATA_PATH=$work/annotated/cod/cod.jsonl,$work/annotated/dd/dd.jsonl bash $train-finetune-qwen-stage0-warmup.sh
OUTPUT_DIR=$work/reasoning PREV_STAGE_CHECKPOINT=$work/base \
    DATA_PATH=$work/annotated/cot/cot.jsonl,$work/annotated/short/short.jsonl bash $train-finetune-qwen-stage0-warmup.sh

perception=$work/perception reasoning=$work/reasoning
if [[ "${PREFERENCE:-0}" == 1 ]]; then
    step "4/9 preference: prefer the annotations to what the generators say of corrupted images (DPO)"
    prefer() { # name of the generator, annotated records
        local checkpoint=$work/$1 noisy=$work/noisy/$1 pairs=$work/pairs/$1
        OUTPUT_DIR=$noisy MODEL_PATH=$checkpoint DATA_PATH=$2 PROMPT=default N_CANDIDATES=1 \
            AUGMENT_METHODS=${AUGMENT_METHODS:-gaussian_blur,color_jitter,mirror_rotation,mask} \
            bash recap_scripts/reasoning_inference.sh
        (
            source training_scripts/launch.sh
            single quality_evaluation.pairs --annotated "$2" --corrupted "$noisy/candidates.jsonl" \
                --image_folder "$IMAGE_FOLDER" --output_dir "$pairs"
        )
        OUTPUT_DIR=$checkpoint-dpo PREV_STAGE_CHECKPOINT=$checkpoint DATA_PATH=$pairs/pairs.jsonl \
            bash training_scripts/dpo.sh
    }
    prefer perception "$work/annotated/cod/cod.jsonl"
    prefer reasoning "$work/annotated/cot/cot.jsonl"
    perception=$work/perception-dpo reasoning=$work/reasoning-dpo
fi

step "5/9 generate: three captions per image, three responses per question (two in steps, one direct)"
OUTPUT_DIR=$work/candidates/captions MODEL_PATH=$perception DATA_PATH=$UNLABELLED_IMAGES \
    PROMPT=cod-default,default N_CANDIDATES=2,1 bash recap_scripts/recap_inference.sh
OUTPUT_DIR=$work/candidates/responses MODEL_PATH=$reasoning DATA_PATH=$UNLABELLED_QUESTIONS AUGMENT_METHODS='' \
    PROMPT=cot-default,default N_CANDIDATES=2,1 bash recap_scripts/reasoning_inference.sh

step "6/9 curate: keep what agrees with itself"
OUTPUT_DIR=$work/curated/captions RAW_DATASET=$work/candidates/captions/candidates.jsonl \
    bash quality_evaluation/scripts/recaption_quality_eval.sh
OUTPUT_DIR=$work/curated/reasoning RAW_DATASET=$work/candidates/responses/candidates.jsonl \
    bash quality_evaluation/scripts/reasoning_quality_eval.sh

step "7/9 stage 1.5: pre-train on what was kept"
OUTPUT_DIR=$work/pretrained MM_PROJECTOR_CHECKPOINT=$work/align \
    DATA_PATH=$work/curated/captions/chosen.jsonl,$work/curated/reasoning/chosen.jsonl${TEXT_ONLY_DATA:+,$TEXT_ONLY_DATA} \
    bash $train-finetune-qwen-stage15-sft.sh

step "8/9 stage 2: fine-tune"
OUTPUT_DIR=$work/sicog PREV_STAGE_CHECKPOINT=$work/pretrained DATA_PATH=$SFT_DATA bash $train-finetune-qwen-stage2-sft.sh

step "9/9 evaluate the base model against SICOG"
for model in base sicog; do
    OUTPUT_DIR=$work/evaluation/$model MODEL_PATH=$work/$model DATA_PATH=$BENCHMARKS bash training_scripts/evaluate.sh
done
if [[ -n "${DRY_RUN:-}" ]]; then exit 0; fi
source training_scripts/launch.sh
single llava.eval.report --results base="$work/evaluation/base" SICOG="$work/evaluation/sicog" --output "$work/table"
single quality_evaluation.report --work_dir "$work" --image_folder "$IMAGE_FOLDER"
