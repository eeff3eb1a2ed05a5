"""Every script through bash: missing variables explain themselves, dry runs go through the real parsers."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "llava" / "toy" / "weights"


def bash(script, *flags, expect=0, **variables):
    kept = ("PATH", "HOME", "VIRTUAL_ENV", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key in kept} | {
        "PYTHON": str(ROOT / ".venv/bin/python")
    }
    if not Path(environment["PYTHON"]).exists():
        environment["PYTHON"] = "python3"
    result = subprocess.run(
        ["bash", str(ROOT / script), *flags], env=environment | {key: str(value) for key, value in variables.items()},
        capture_output=True, text=True, timeout=300, check=False, cwd="/",
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    return result


REQUIRED = {
    "training_data_annotation/revise_cod.sh": ["ORIGINAL_CAPTION_FILE", "IMAGE_DIR", "OUTPUT_COD_DIR", "OUTPUT_DD_DIR"],
    "training_data_annotation/revise_cot.sh": ["ORIGINAL_COT_FILE", "OUTPUT_COT_DIR", "OUTPUT_SHORT_DIR"],
    "recap_scripts/recap_inference.sh": ["MODEL_PATH", "DATA_PATH"],
    "recap_scripts/reasoning_inference.sh": ["MODEL_PATH", "DATA_PATH"],
    "quality_evaluation/scripts/recaption_quality_eval.sh": ["RAW_DATASET"],
    "quality_evaluation/scripts/reasoning_quality_eval.sh": ["RAW_DATASET"],
    "training_scripts/uhdv1-finetune-qwen-stage0-warmup.sh": ["EXPERIMENT_NAME", "DATA_PATH", "PREV_STAGE_CHECKPOINT"],
    "training_scripts/uhdv1-pretrain-qwen-stage1-align.sh": ["EXPERIMENT_NAME", "DATA_PATH", "LLM_CKPT_DIR", "CLIP_CKPT_DIR"],
    "training_scripts/uhdv1-finetune-qwen-stage15-sft.sh": ["EXPERIMENT_NAME", "DATA_PATH", "MM_PROJECTOR_CHECKPOINT"],
    "training_scripts/uhdv1-finetune-qwen-stage2-sft.sh": ["EXPERIMENT_NAME", "DATA_PATH", "PREV_STAGE_CHECKPOINT"],
    "training_scripts/dpo.sh": ["EXPERIMENT_NAME", "DATA_PATH", "PREV_STAGE_CHECKPOINT"],
    "training_scripts/evaluate.sh": ["MODEL_PATH", "DATA_PATH"],
    "training_scripts/run_sicog.sh": [
        "EXPERIMENT_NAME", "LLM_CKPT_DIR", "CLIP_CKPT_DIR", "ALIGN_DATA", "SFT_DATA", "ORIGINAL_CAPTION_FILE",
        "ORIGINAL_COT_FILE", "UNLABELLED_IMAGES", "UNLABELLED_QUESTIONS", "BENCHMARKS",
    ],
}  # fmt: skip


def test_every_script_is_covered():
    found = {str(path.relative_to(ROOT)) for folder in ("training_scripts", "recap_scripts", "quality_evaluation", "training_data_annotation")
             for path in (ROOT / folder).rglob("*.sh")}  # fmt: skip
    assert found - {f"training_scripts/{name}.sh" for name in ("launch", "setup", "quickstart")} == set(REQUIRED)


@pytest.mark.parametrize("script", REQUIRED)
def test_each_missing_variable_is_named_with_an_example_at_once(script):
    for missing in REQUIRED[script]:
        variables = {name: "/tmp" for name in REQUIRED[script] if name != missing}
        start = time.time()
        result = bash(script, expect=1, **variables)
        assert time.time() - start < 3  # below a second on a quiet machine
        last = result.stderr.strip().splitlines()[-1]
        assert f"{missing}: " in last
        assert len(last.split(f"{missing}: ")[1]) > 15


@pytest.mark.parametrize("script", REQUIRED)
def test_scripts_are_strict_and_pass_flags_on(script):
    text = (ROOT / script).read_text()
    assert "set -euo pipefail" in text
    assert script.endswith("run_sicog.sh") or '"$@"' in text
    assert text.startswith("#!/usr/bin/env bash\n# ")


def dry(script, **variables):
    start = time.time()
    printed = bash(script, DRY_RUN="print", **variables).stdout
    assert time.time() - start < 3
    checked = bash(script, DRY_RUN="1", **variables).stdout
    assert checked.startswith(printed.splitlines()[0])
    assert "nothing was written" in checked
    return checked


def test_dry_run_of_annotation(world, tmp_path):
    common = {"OUTPUT_COD_DIR": tmp_path / "cod", "OUTPUT_DD_DIR": tmp_path / "a folder with spaces"}
    out = dry(
        "training_data_annotation/revise_cod.sh",
        ORIGINAL_CAPTION_FILE=world / "captioned.json",
        IMAGE_DIR=world,
        **common,
    )
    assert "--model gpt-4o" in out
    assert "every image found" in out
    out = dry("training_data_annotation/revise_cot.sh", ORIGINAL_COT_FILE=world / "reasoning.jsonl",
              OUTPUT_COT_DIR=tmp_path / "cot", OUTPUT_SHORT_DIR=tmp_path / "short")  # fmt: skip
    assert "15 convertible, 0 not" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_training(world, checkpoint, tmp_path):
    common = {"EXPERIMENT_NAME": "my run", "OUTPUT_DIR": tmp_path / "out", "DATA_PATH": world / "instructions.json"}
    for script in ("stage0-warmup", "stage2-sft"):
        out = dry(f"training_scripts/uhdv1-finetune-qwen-{script}.sh", PREV_STAGE_CHECKPOINT=checkpoint, **common)
        assert "global batch 128" in out
        assert "vision 302,208, projector 96,640, language 648,832" in out
        assert "--learning_rate 2e-5" in out
    out = dry(
        "training_scripts/uhdv1-finetune-qwen-stage15-sft.sh",
        MM_PROJECTOR_CHECKPOINT=checkpoint,
        ACCU_STEPS="3",
        **common,
    )
    assert "global batch 12 = 4 a device x 3 accumulation x 1 processes" in out
    out = dry(
        "training_scripts/uhdv1-pretrain-qwen-stage1-align.sh",
        LLM_CKPT_DIR=WEIGHTS / "qwen2",
        CLIP_CKPT_DIR=WEIGHTS / "clip",
        **common,
    )
    assert "global batch 256" in out
    assert "--train_parts projector" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_generation_curation_and_evaluation(world, checkpoint, tmp_path):
    common = {"MODEL_PATH": checkpoint, "OUTPUT_DIR": tmp_path / "out"}
    out = dry(
        "recap_scripts/recap_inference.sh",
        DATA_PATH=world / "unlabelled_images.json",
        PROMPT="cod-conv",
        TEMPERATURE="0.5",
        **common,
    )
    assert "--temperature 0.5" in out
    assert "Describe the image step-by-step." in out
    out = dry(
        "recap_scripts/reasoning_inference.sh",
        DATA_PATH=world / "unlabelled",
        SPLIT="questions",
        AUGMENT_METHODS="mask,color_jitter",
        **common,
    )
    assert "Answer the question step-by-step." in out
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text(
        '{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "Hi"}], "candidates": ["a", "b"]}\n'
    )
    for script in ("recaption", "reasoning"):
        out = dry(
            f"quality_evaluation/scripts/{script}_quality_eval.sh", RAW_DATASET=candidates, OUTPUT_DIR=tmp_path / "out"
        )
        assert "1 with 2 candidates" in out
    out = dry("training_scripts/evaluate.sh", DATA_PATH=world / "benchmarks", **common)
    assert "ToyMCQ" in out
    assert [path.name for path in tmp_path.iterdir()] == ["candidates.jsonl"]


def test_dry_run_of_preference_training(world, checkpoint, tmp_path):
    pair = {"id": "1", "prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    out = dry("training_scripts/dpo.sh", EXPERIMENT_NAME="my run", OUTPUT_DIR=tmp_path / "out", PREV_STAGE_CHECKPOINT=checkpoint,
              DATA_PATH=tmp_path / "pairs.jsonl", DPO_BETA="0.2")  # fmt: skip
    assert "1 x sigmoid (beta 0.2) + 1 x loss of the chosen answer" in out
    assert "global batch 128" in out
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_one_command_evaluates_in_three_ways(world, checkpoint, tmp_path):
    kit = tmp_path / "kit"
    for name, text in (("run.py", ""), ("vlmeval/config.py", "supported_VLM = {}"), ("vlmeval/vlm/base.py", "")):
        (kit / name).parent.mkdir(parents=True, exist_ok=True)
        (kit / name).write_text(text)
    script, local = "training_scripts/evaluate.sh", {"MODEL_PATH": checkpoint, "OUTPUT_DIR": tmp_path / "out"}
    out = dry(
        script, BACKEND="vlmevalkit", VLMEVALKIT_DIR=kit, BENCHMARK="MMStar,POPE", JUDGE="exact_matching", **local
    )
    assert (
        f"run.py --data MMStar POPE --model init --work-dir {tmp_path}/out --mode all --judge exact_matching --reuse"
        in out
    )
    out = dry(script, BACKEND="lmms-eval", BENCHMARK="mme,mmstar", **local)
    assert "-m lmms_eval --model llava_uhd --model_args pretrained=" in out
    assert "--tasks mme,mmstar --batch_size 16" in out
    served = {"BASE_URL": "http://127.0.0.1:8000/v1", "MODEL": "name", "OUTPUT_DIR": tmp_path / "out"}
    out = dry(script, DATA_PATH=world / "benchmarks", **served)
    assert "--base_url http://127.0.0.1:8000/v1 --model name" in out
    assert "ToyMCQ" in out
    out = dry(script, BACKEND="lmms-eval", BENCHMARK="mme", **served)
    assert "--model openai --model_args model=name,base_url=http://127.0.0.1:8000/v1" in out
    assert "benchmarks as vlmevalkit names them" in bash(script, expect=1, BACKEND="vlmevalkit", **local).stderr
    assert "is none of own, vlmevalkit, lmms-eval" in bash(script, expect=2, BACKEND="x", BENCHMARK="a", **local).stderr
    sharded = bash(script, DRY_RUN="print", DATA_PATH=world / "benchmarks", NPROC_PER_NODE=4, **local).stdout
    assert "torch.distributed.run --standalone --nproc-per-node 4 -m llava.eval.benchmarks" in sharded


def test_dry_run_of_the_whole_cycle_names_every_stage(world):
    variables = dict.fromkeys(REQUIRED["training_scripts/run_sicog.sh"], str(world)) | {"EXPERIMENT_NAME": "x"}
    out = bash("training_scripts/run_sicog.sh", DRY_RUN="1", **variables).stdout
    assert [line for line in out.splitlines() if line.startswith("---")][-1].startswith("--- 9/9")
    assert out.count("-m llava.train.sft") == 6
    assert out.count("-m llava.generate.") == 2
    assert not (ROOT / "runs" / "x").exists()
    out = bash("training_scripts/run_sicog.sh", DRY_RUN="1", PREFERENCE=1, AUGMENT_METHODS="mask", **variables).stdout
    assert out.count("-m llava.train.dpo") == out.count("-m quality_evaluation.pairs") == 2
    assert out.count("--augment mask") == 2  # the noisy answers alone
    assert "--model_name_or_path runs/x/perception-dpo --data_path" in out
    assert "--model_name_or_path runs/x/reasoning-dpo --data_path" in out
    assert not (ROOT / "runs" / "x").exists()


def test_several_nodes_and_gpus_reach_torchrun(world, checkpoint, tmp_path):
    common = {
        "EXPERIMENT_NAME": "x",
        "OUTPUT_DIR": tmp_path,
        "DATA_PATH": world / "align.json",
        "PREV_STAGE_CHECKPOINT": checkpoint,
        "DRY_RUN": "print",
    }
    script = "training_scripts/uhdv1-finetune-qwen-stage2-sft.sh"
    out = bash(script, NNODES=4, NODE_RANK=2, MASTER_ADDR="10.0.0.1", NPROC_PER_NODE=8, **common).stdout
    assert (
        "torch.distributed.run --nnodes 4 --node-rank 2 --master-addr 10.0.0.1 --master-port 29500 --nproc-per-node 8 -m llava.train.sft"
        in out
    )
    out = bash(script, SLURM_NNODES=2, SLURM_NODEID=1, MASTER_ADDR="n1", **common).stdout
    assert "--nnodes 2 --node-rank 1" in out
    out = bash(script, DISTRIBUTED_ARGS="--nproc-per-node=3 --standalone", **common).stdout
    assert "torch.distributed.run --nproc-per-node=3 --standalone -m" in out
    out = bash(script, "--learning_rate", "1e-6", DEEPSPEED_CONFIG="training_scripts/zero3.json", **common).stdout
    assert "--deepspeed training_scripts/zero3.json" in out
    assert out.strip().endswith("--learning_rate 1e-6")
    assert "address of the first node" in bash(script, expect=1, NNODES=2, **common).stderr


def test_names_that_published_scripts_read_by_mistake_are_accepted_with_a_note(world, checkpoint, tmp_path):
    result = bash("training_scripts/uhdv1-finetune-qwen-stage2-sft.sh", EXPERIMENT_NAME="x", OUTPUT_DIR=tmp_path, DRY_RUN="print",
                  DATA_PATH=world / "align.json", PREV_STAGE_CHECKPOINT=checkpoint, FINETUNE_RANK_BATCH=6)  # fmt: skip
    assert "--per_device_train_batch_size 6" in result.stdout
    assert "note: FINETUNE_RANK_BATCH is used as FINETUNE_BATCH" in result.stderr


def test_tasks_of_a_slurm_array_are_ranks_without_torchrun(world, checkpoint, tmp_path):
    given = {"MODEL_PATH": checkpoint, "DATA_PATH": world / "unlabelled_images.json", "OUTPUT_DIR": tmp_path / "out"}
    given |= {"DRY_RUN": "print", "DEEPSPEED_CONFIG": "training_scripts/zero2.json", "SLURM_ARRAY_TASK_MIN": 1}
    given |= {"SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_STEP": 2, "SLURM_ARRAY_TASK_ID": 5}
    script = "recap_scripts/recap_inference.sh"
    assert "torch.distributed.run" not in bash(script, **given).stdout
    refused = bash(script, expect=2, **{**given, "SLURM_ARRAY_TASK_ID": 9})
    assert "Fix: --array=0-2" in refused.stderr


def test_a_dry_run_knows_the_processes_of_distributed_args(world, checkpoint, tmp_path):
    given = {"EXPERIMENT_NAME": "x", "PREV_STAGE_CHECKPOINT": checkpoint, "DATA_PATH": world / "instructions.json"}
    arguments = "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.1"
    out = bash(
        "training_scripts/uhdv1-finetune-qwen-stage2-sft.sh", DRY_RUN="1", DISTRIBUTED_ARGS=arguments, OUTPUT_DIR=tmp_path / "o", **given
    ).stdout  # fmt: skip
    assert "16 processes" in out


def test_dry_run_says_where_each_variable_came_from(world, checkpoint, tmp_path):
    given = {"EXPERIMENT_NAME": "x", "PREV_STAGE_CHECKPOINT": checkpoint, "DATA_PATH": world / "instructions.json"}
    given |= {
        "FINETUNE_BATCH": 2,
        "SLURM_NNODES": 2,
        "SLURM_NODEID": 1,
        "MASTER_ADDR": "10.0.0.1",
        "HF_TOKEN": "secret",
    }
    out = bash("training_scripts/uhdv1-finetune-qwen-stage2-sft.sh", DRY_RUN="print", **given).stdout
    rows = {line.split()[0]: line.split()[1:] for line in out.split("\n\n")[0].splitlines()}
    assert rows["FINETUNE_BATCH"] == ["exported", "2"]
    assert rows["FINETUNE_LEARNING_RATE"] == ["default", "2e-5"]
    assert rows["OUTPUT_DIR"] == ["default", "model_weight/x"]
    assert rows["NNODES"] == ["SLURM_NNODES", "2"]
    assert rows["NODE_RANK"] == ["SLURM_NODEID", "1"]
    assert "secret" not in out


def test_variables_are_data_and_never_run(world, checkpoint, tmp_path):
    marker = tmp_path / "marker"
    for payload in (f"$(touch {marker})", f"`touch {marker}`", f"; touch {marker}", "a b*", "'\""):
        bash("training_scripts/uhdv1-finetune-qwen-stage2-sft.sh", EXPERIMENT_NAME=payload, PRETRAIN_BATCH=payload, DRY_RUN="print",
             DATA_PATH=payload, PREV_STAGE_CHECKPOINT=checkpoint, FINETUNE_LEARNING_RATE=payload, SEED=payload)  # fmt: skip
    assert not marker.exists()


def test_wrong_inputs_are_one_sentence(world, checkpoint, tmp_path):
    script, common = "recap_scripts/recap_inference.sh", {"OUTPUT_DIR": tmp_path / "out"}
    error = bash(script, expect=2, MODEL_PATH="/nowhere", DATA_PATH="x", **common).stderr
    assert error.startswith("error: MODEL_PATH=/nowhere does not exist. Fix:")
    error = bash(script, expect=2, MODEL_PATH=WEIGHTS / "qwen2", DATA_PATH=world / "align.json", **common).stderr
    assert "is a 'qwen2' model, not llava_uhd" in error
    error = bash(
        script, expect=2, MODEL_PATH=checkpoint, DATA_PATH=world / "align.json", PROMPT="poem", **common
    ).stderr
    assert error == "error: PROMPT is 'poem'; choose one of cod-default, cod-conv, default\n"
    empty = tmp_path / "folder without images"
    empty.mkdir()
    error = bash(
        script,
        expect=2,
        MODEL_PATH=checkpoint,
        DATA_PATH=world / "align.json",
        IMAGE_FOLDER=empty,
        DRY_RUN="1",
        **common,
    ).stderr
    assert "no image can be read" in error
    assert "Traceback" not in error
