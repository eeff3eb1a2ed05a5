#!/usr/bin/env bash
# The whole cycle on the embedded toy world, from nothing: set-up into .venv, world, run_sicog.sh, report.
#   writes  runs/quickstart/ (delete it to start afresh); a second call continues or finds everything complete
#   cost    under 10 minutes and 4 GiB on 2 CPU cores after installation
#   usage   bash training_scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${DRY_RUN:-}" ]]; then bash training_scripts/setup.sh; fi
export PYTHON=.venv/bin/python HF_HUB_OFFLINE=1

world=runs/quickstart-world
if [[ -z "${DRY_RUN:-}" && ! -f $world/truth.jsonl ]]; then $PYTHON -m llava.toy.world --output $world; fi

# the offline annotator stands in for GPT-4o
if [[ -z "${DRY_RUN:-}" ]]; then
    rm -f $world/annotator.port
    $PYTHON -m llava.toy.annotator --world $world --port_file $world/annotator.port &
    trap 'kill $! 2>/dev/null' EXIT
    until [[ -f $world/annotator.port ]]; do
        kill -0 $! || exit 1 # it said why
        sleep 0.1
    done
    OPENAI_BASE_URL=http://127.0.0.1:$(<$world/annotator.port)/v1
    export OPENAI_BASE_URL
fi
export ANNOTATOR_MODEL=toy-annotator

export EXPERIMENT_NAME=quickstart
export LLM_CKPT_DIR=llava/toy/weights/qwen2 CLIP_CKPT_DIR=llava/toy/weights/clip RESAMPLER_GRID=3
export ALIGN_DATA=$world/align.json SFT_DATA=$world/instructions.json TEXT_ONLY_DATA=$world/text_only.jsonl
export ORIGINAL_CAPTION_FILE=$world/captioned.json ORIGINAL_COT_FILE=$world/reasoning.jsonl
export UNLABELLED_IMAGES=$world/unlabelled_images.json UNLABELLED_QUESTIONS=$world/unlabelled_questions.json
export BENCHMARKS=$world/benchmarks
# a model of a million parameters learns faster, and needs smaller batches, than one of seven billion
export PRETRAIN_LEARNING_RATE=2e-3 PRETRAIN_BATCH=16 FINETUNE_LEARNING_RATE=5e-4 FINETUNE_BATCH=16 ACCU_STEPS=1
export DPO_LEARNING_RATE=3e-5 DPO_BETA=0.5 DPO_BATCH=16 GRADIENT_CHECKPOINTING=False BATCH_SIZE=64 MAX_NEW_TOKENS=220
bash training_scripts/run_sicog.sh
