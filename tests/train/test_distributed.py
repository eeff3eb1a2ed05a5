"""Training on two ranks: same samples and losses as on one, through the stage script."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def environment(checkpoint, world, output, **variables) -> dict[str, str]:
    python = ROOT / ".venv" / "bin" / "python"
    return {
        **os.environ, "PYTHON": str(python) if python.exists() else "python3", "DS_ACCELERATOR": "cpu",
        "EXPERIMENT_NAME": "x", "OUTPUT_DIR": str(output), "PREV_STAGE_CHECKPOINT": str(checkpoint),
        "DATA_PATH": str(world / "instructions.json"), "GLOBAL_BATCH_SIZE": "16", **variables,
    }  # fmt: skip


def command(*flags) -> list[str]:
    script = ROOT / "training_scripts" / "uhdv1-finetune-qwen-stage2-sft.sh"
    return ["bash", str(script), "--max_steps", "3", "--logging_steps", "1", "--dataloader_num_workers", "0", *flags]


def losses(checkpoint, world, output, *flags, **variables):
    settings = environment(checkpoint, world, output, **variables)
    result = subprocess.run(command(*flags), env=settings, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [row["loss"] for row in read_jsonl(output / "log.jsonl") if "loss" in row]


def test_two_ranks_give_the_losses_of_one(checkpoint, world, tmp_path):
    one = losses(checkpoint, world, tmp_path / "one", FINETUNE_BATCH="8")
    two = losses(checkpoint, world, tmp_path / "two", FINETUNE_BATCH="4", NPROC_PER_NODE="2")
    assert two == pytest.approx(one, rel=1e-4)
    again = losses(
        checkpoint, world, tmp_path / "two", FINETUNE_BATCH="4", NPROC_PER_NODE="2"
    )  # recognised as complete
    assert again == two


def test_two_ranks_killed_in_the_second_epoch_end_with_the_same_weights(checkpoint, world, tmp_path):
    """Twelve records, a global batch of four: three steps an epoch, and enough of them to be killed in time."""
    few = world / "twelve.json"
    few.write_text(json.dumps(json.loads((world / "instructions.json").read_text())[:12]))
    settings = {
        "DATA_PATH": str(few),
        "FINETUNE_BATCH": "2",
        "GLOBAL_BATCH_SIZE": "4",
        "NPROC_PER_NODE": "2",
        "SAVE_STEPS": "2",
    }
    flags = ("--max_steps", "30")
    losses(checkpoint, world, tmp_path / "straight", *flags, **settings)
    killed = subprocess.Popen(
        command(*flags), env=environment(checkpoint, world, tmp_path / "killed", **settings), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 240
    while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").is_file():
        assert killed.poll() is None, "finished before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    losses(checkpoint, world, tmp_path / "killed", *flags, **settings)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_two_ranks_asked_to_leave_save_and_continue(checkpoint, world, tmp_path, number):
    """The signal goes to the script, as a scheduler sends it; its status says that the job can be put back."""
    few = world / "twelve.json"
    few.write_text(json.dumps(json.loads((world / "instructions.json").read_text())[:12]))
    settings = {"DATA_PATH": str(few), "FINETUNE_BATCH": "2", "GLOBAL_BATCH_SIZE": "4", "NPROC_PER_NODE": "2"}
    output, flags = tmp_path / "out", ("--max_steps", "40")
    script = subprocess.Popen(
        command(*flags), env=environment(checkpoint, world, output, **settings), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 240
    while not (output / "log.jsonl").is_file():
        assert script.poll() is None, script.communicate()[1][-2000:]
        assert time.time() < deadline
        time.sleep(0.02)
    script.send_signal(number)
    _, errors = script.communicate(timeout=200)
    assert script.returncode == 75, errors[-3000:]
    saved = max(int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*"))
    assert 0 < saved < 40
    losses(checkpoint, world, output, *flags, **settings)
    steps = [row["step"] for row in read_jsonl(output / "log.jsonl") if "loss" in row]
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_two_nodes_of_one_rank_give_the_losses_of_one(checkpoint, world, tmp_path):
    """Two launches that know each other by NNODES, NODE_RANK and MASTER_ADDR alone, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = losses(checkpoint, world, tmp_path / "one", FINETUNE_BATCH="8")
    output = tmp_path / "two"
    shared = {"FINETUNE_BATCH": "4", "NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"}
    nodes = [
        subprocess.Popen(
            command(), stderr=subprocess.PIPE, text=True,
            env=environment(checkpoint, world, output, NODE_RANK=str(rank), MASTER_PORT=str(port), **shared),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    assert [row["loss"] for row in read_jsonl(output / "log.jsonl") if "loss" in row] == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_deepspeed_on_two_ranks(checkpoint, world, tmp_path, config):
    """The losses of one plain rank; a global batch of text and images mixed, so that a rank may have no image."""
    if importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None:
        pytest.skip(f"DeepSpeed or g++ is missing: {config} WAS NOT TESTED")
    few = world / "mixed.json"
    texts = [json.loads(line) for line in (world / "text_only.jsonl").read_text().splitlines()]
    few.write_text(json.dumps([*json.loads((world / "instructions.json").read_text())[:6], *texts[:2]]))
    settings = {"DATA_PATH": str(few), "GLOBAL_BATCH_SIZE": "4"}
    one = losses(checkpoint, world, tmp_path / "one", FINETUNE_BATCH="4", **settings)
    two = losses(
        checkpoint, world, tmp_path / "two", FINETUNE_BATCH="2", NPROC_PER_NODE="2",
        DEEPSPEED_CONFIG=f"training_scripts/{config}.json", **settings,
    )  # fmt: skip
    assert two == pytest.approx(one, rel=1e-3)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() <= second.keys() <= first.keys() | {"lm_head.weight"}  # ZeRO-2 writes the tied head out
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
