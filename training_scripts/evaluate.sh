#!/usr/bin/env bash
# Evaluate a checkpoint, or a served model, on benchmarks: by VLMEvalKit's rules, through VLMEvalKit, or through lmms-eval.
#   reads   MODEL_PATH (checkpoint folder; or BASE_URL and MODEL, a chat-completions server), and
#           BACKEND=own         DATA_PATH: VLMEvalKit TSV files, comma-separated, or a folder of them
#           BACKEND=vlmevalkit  BENCHMARK: its names of benchmarks, comma-separated; VLMEVALKIT_DIR: its checkout
#           BACKEND=lmms-eval   BENCHMARK: its names of tasks, comma-separated
#   writes  OUTPUT_DIR, default runs/evaluation/<model's name>, runs/vlmevalkit or runs/lmms-eval
#   usage   MODEL_PATH=model_weight/sicog DATA_PATH=data/MMStar.tsv bash training_scripts/evaluate.sh [any flag]
#           JUDGE=gpt-4o (and OPENAI_BASE_URL, OPENAI_API_KEY) lets a language model read what exact rules cannot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source training_scripts/launch.sh

BACKEND=${BACKEND:-own}
engine=() # evaluation never uses DeepSpeed
if [[ -n "${BASE_URL:-}" ]]; then # one process asks the server, as often as it may
    : "${MODEL:?the name under which the server at BASE_URL knows the model}"
    NPROC_PER_NODE=1
    model=(--base_url "$BASE_URL" --model "$MODEL")
    BATCH_SIZE=${BATCH_SIZE:-64}
else
    : "${MODEL_PATH:?the checkpoint folder to evaluate, for example MODEL_PATH=model_weight/sicog, or BASE_URL and MODEL}"
    require_path MODEL_PATH
    model=(--model_name_or_path "$MODEL_PATH")
    BATCH_SIZE=${BATCH_SIZE:-16}
fi
if [[ "$BACKEND" != own ]]; then
    : "${BENCHMARK:?benchmarks as $BACKEND names them, comma-separated, for example BENCHMARK=MMStar,MMVet}"
    IFS=, read -r -a benchmarks <<<"$BENCHMARK"
fi

case "$BACKEND" in
    own)
        : "${DATA_PATH:?TSV files or their folder, for example DATA_PATH=data/MMStar.tsv}"
        array_rank
        launch llava.eval.benchmarks \
            "${model[@]}" \
            --data_path "$DATA_PATH" \
            --batch_size "$BATCH_SIZE" \
            --max_new_tokens "${MAX_NEW_TOKENS:-64}" \
            ${JUDGE:+--judge "$JUDGE"} \
            --output_dir "${OUTPUT_DIR:-runs/evaluation/$(basename "${MODEL_PATH:-$MODEL}")}" \
            "$@"
        ;;
    vlmevalkit)
        : "${VLMEVALKIT_DIR:?a checkout of VLMEvalKit, or the folder that holds its package vlmeval}"
        launch llava.eval.vlmevalkit \
            --vlmevalkit_dir "$VLMEVALKIT_DIR" \
            "${model[@]}" \
            --data "${benchmarks[@]}" \
            --work_dir "${OUTPUT_DIR:-runs/vlmevalkit}" \
            --max_new_tokens "${MAX_NEW_TOKENS:-1024}" \
            ${JUDGE:+--judge "$JUDGE"} \
            --reuse \
            "$@"
        ;;
    lmms-eval)
        launch llava.eval.lmms_model \
            "${model[@]}" \
            --tasks "${benchmarks[@]}" \
            --work_dir "${OUTPUT_DIR:-runs/lmms-eval}" \
            --batch_size "$BATCH_SIZE" \
            --max_new_tokens "${MAX_NEW_TOKENS:-1024}" \
            "$@"
        ;;
    *)
        echo "error: BACKEND=$BACKEND is none of own, vlmevalkit, lmms-eval" >&2
        exit 2
        ;;
esac
