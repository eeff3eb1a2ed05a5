# shellcheck shell=bash
# Sourced by every stage script, after `cd` to the repository root.
#   launch MODULE FLAGS...   one process per GPU through torchrun; a plain process where one is enough
#   single MODULE FLAGS...   always one process
# DRY_RUN=1 prints every variable and where it came from, the exact command, then checks arguments and data without
# writing (DRY_RUN=print: no check).
# Several nodes: NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE (SLURM's variables stand in for them), or
# DISTRIBUTED_ARGS, which is handed to torchrun as it is. PYTHON names the interpreter.
exported=" $(compgen -e | tr '\n' ' ') " # the variables the user gave, before defaults are filled in
unset LAUNCH_VARIABLES
export TOKENIZERS_PARALLELISM=false

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then PYTHON=python; elif [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then # empty or -1: none
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]') || gpus=0
fi
NNODES=${NNODES:-${SLURM_NNODES:-1}}
if [[ "${DISTRIBUTED_ARGS:-}" =~ --node[-_]rank[=\ ]([0-9]+) ]]; then NODE_RANK=${BASH_REMATCH[1]}; fi
if [[ "${DISTRIBUTED_ARGS:-}" =~ --nnodes[=\ ]([0-9]+) ]]; then NNODES=${BASH_REMATCH[1]}; fi
if [[ "${DISTRIBUTED_ARGS:-}" =~ --nproc[-_]per[-_]node[=\ ]([0-9]+) ]]; then NPROC_PER_NODE=${BASH_REMATCH[1]}; fi
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
# DeepSpeed ZeRO-2 where there is a GPU and DeepSpeed; DEEPSPEED_CONFIG names another file, or `none`.
engine=()
if [[ -z "${DEEPSPEED_CONFIG:-}" && "$gpus" -gt 0 ]] && "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))'; then
    DEEPSPEED_CONFIG=training_scripts/zero2.json
fi
if [[ "$gpus" == 0 ]]; then export DS_ACCELERATOR=cpu; fi
if [[ "${DEEPSPEED_CONFIG:-none}" != none ]]; then engine=(--deepspeed "$DEEPSPEED_CONFIG"); fi

launch() {
    local distributed=()
    if [[ -n "${DISTRIBUTED_ARGS:-}" ]]; then
        read -r -a distributed <<<"$DISTRIBUTED_ARGS"
    elif ((NNODES > 1)); then
        if [[ -z "${MASTER_ADDR:-}" && -n "${SLURM_JOB_NODELIST:-}" ]] && command -v scontrol >/dev/null; then
            MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        fi
        : "${MASTER_ADDR:?address of the first node, for example MASTER_ADDR=10.0.0.1}"
        distributed=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
            --master-port "${MASTER_PORT:-29500}" --nproc-per-node "$NPROC_PER_NODE")
    elif ((NPROC_PER_NODE > 1 || ${#engine[@]})); then # DeepSpeed wants torchrun's variables even for one process
        distributed=(--standalone --nproc-per-node "$NPROC_PER_NODE")
    fi
    if ((${#distributed[@]})); then
        execute "$PYTHON" -m torch.distributed.run "${distributed[@]}" -m "$@"
    elif [[ -n "${DRY_RUN:-}" ]]; then
        execute "$PYTHON" -m "$@"
    else
        LAUNCH_VARIABLES=$(variables) exec "$PYTHON" -m "$@" # launch is the last command of a script: signals reach the run itself
    fi
}

# One line a variable of the calling script: name, value, origin. Secrets are not shown.
variables() {
    local variable value origin script=$0
    if [[ "$script" != /* ]]; then script=$OLDPWD/$script; fi # every script has changed to the repository's root
    # shellcheck disable=SC2016 # the pattern is looked for as it stands
    for variable in $(grep -ohE '\$\{[A-Z][A-Z_]+' "$script" | cut -c3- | sort -u) NNODES NODE_RANK NPROC_PER_NODE DEEPSPEED_CONFIG; do
        value=${!variable:-}
        case "$variable" in
            BASH_SOURCE) continue ;;
            NNODES) origin=${SLURM_NNODES:+SLURM_NNODES} ;;
            NODE_RANK) origin=${SLURM_NODEID:+SLURM_NODEID} ;;
            *) origin= ;;
        esac
        if [[ "$exported" == *" $variable "* ]]; then
            origin=exported
        elif [[ -z "$value" ]]; then
            eval "value=\"$(grep -ohE "\\\$\{$variable:-[^}]*\}" "$script" | head -n 1)\"" # as the script itself expands it
        fi
        if [[ "$variable" =~ _(KEY|TOKEN)$ && -n "$value" ]]; then value='(set)'; fi
        if [[ -n "$value" ]]; then printf '%-28s %-12s %s\n' "$variable" "${origin:-default}" "$value"; fi
    done
}

single() { execute "$PYTHON" -m "$@"; }

execute() {
    local shown=${LAUNCH_VARIABLES:-}
    LAUNCH_VARIABLES=$(variables)
    export LAUNCH_VARIABLES # for preflight.txt
    if [[ -z "${DRY_RUN:-}" ]]; then
        if [[ "$*" == *torch.distributed.run* ]]; then forward "$@"; else "$@"; fi
        return
    fi
    if [[ -z "$shown" ]]; then printf '%s\n\n' "$LAUNCH_VARIABLES"; fi
    printf '%q ' "$@"
    printf '\n'
    if [[ "$DRY_RUN" != print ]]; then
        while [[ "$1" != -m || "$2" == torch.distributed.run ]]; do shift; done
        PLANNED_WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" "$@" --dry_run
    fi
}

# Run torchrun and hand it the signals a scheduler sends; it hands them to its processes, which save and leave. It
# answers 1 whatever they said, so that a preempted run is known by its run.json; the status is then 75.
forward() {
    local child status=0 output=
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds to save in
    local arguments=("$@") index
    for index in "${!arguments[@]}"; do
        if [[ "${arguments[index]}" == --output_dir ]]; then output=${arguments[index + 1]}; fi
    done
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null' TERM INT USR1 # torchrun itself would die of USR1
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the run
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT USR1
    if ((status)) && grep -qs '"status": "preempted"' "$output/run.json"; then return 75; fi
    return "$status"
}

# The path in this variable must exist: require_path VARIABLE.
require_path() {
    if [[ "${DRY_RUN:-}" != print && ! -e "${!1}" ]]; then
        echo "error: $1=${!1} does not exist. Fix: check the path, or run the stage that writes it" >&2
        exit 2
    fi
}

# Generation in a SLURM array (--array=0-15): every task is a rank, without torchrun; task 0 merges.
array_rank() {
    if [[ -n "${SLURM_ARRAY_TASK_COUNT:-}" ]]; then
        export WORLD_SIZE=$SLURM_ARRAY_TASK_COUNT
        export RANK=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
        if ((RANK >= WORLD_SIZE)); then
            echo "error: array task $SLURM_ARRAY_TASK_ID is not one of $WORLD_SIZE in a row. Fix: --array=0-$((WORLD_SIZE - 1))" >&2
            exit 2
        fi
        NNODES=1 NPROC_PER_NODE=1
    fi
    engine=() # generation never uses DeepSpeed
}

# Wait for a folder that node 0 writes: wait_for FOLDER.
wait_for() {
    local seconds=0
    until [[ -d "$1" || -n "${DRY_RUN:-}" ]]; do
        if ((seconds++ > 3600)); then
            echo "error: $1 did not appear within an hour. Fix: look at node 0's messages" >&2
            exit 2
        fi
        sleep 1
    done
}

# An old name that two published scripts read by mistake is accepted with a note: rename_variable OLD NEW.
rename_variable() {
    if [[ -n "${!1:-}" && -z "${!2:-}" ]]; then
        echo "note: $1 is used as $2" >&2
        printf -v "$2" '%s' "${!1}"
    fi
}

# The global batch: GLOBAL_BATCH_SIZE, else what ACCU_STEPS makes of it, else the paper's (first argument).
batch_flags() {
    batch=()
    if [[ -n "${ACCU_STEPS:-}" ]]; then batch+=(--gradient_accumulation_steps "$ACCU_STEPS"); fi
    if [[ -n "${GLOBAL_BATCH_SIZE:-}" ]]; then
        batch+=(--global_batch_size "$GLOBAL_BATCH_SIZE")
    elif [[ -z "${ACCU_STEPS:-}" ]]; then
        batch+=(--global_batch_size "$1")
    fi
}
