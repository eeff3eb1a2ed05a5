"""Training through its command line on the small world."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file


def command(checkpoint, world, output, *flags):
    """Six steps over two epochs of twelve records."""
    few = world / "few.json"
    few.write_text(json.dumps(json.loads((world / "instructions.json").read_text())[:12]))
    return [
        sys.executable, "-m", "llava.train.sft", "--model_name_or_path", str(checkpoint),
        "--data_path", str(few), "--output_dir", str(output),
        "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--logging_steps", "1", "--max_steps", "6",
        "--save_steps", "2", "--dataloader_num_workers", "0", *flags,
    ]  # fmt: skip


def run(*arguments, expect=0):
    result = subprocess.run(*arguments, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == expect, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def trained(checkpoint, world, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    return output, run(command(checkpoint, world, output))


def test_writes_a_complete_checkpoint_and_says_so_in_one_line(trained, checkpoint):
    from llava.model.load import load_model, load_processor

    output, result = trained
    assert result.stdout.strip().splitlines()[-1].startswith("[train out] ")
    assert "6 steps" in result.stdout
    load_processor(output)
    start, end = load_model(checkpoint, torch.float32), load_model(output, torch.float32)
    assert not torch.equal(start.model.projector.query, end.model.projector.query)
    state = json.loads((output / "run.json").read_text())
    assert state["status"] == "complete"
    assert state["counts"]["steps"] == 6
    assert state["arguments"]["train_parts"] == "vision,projector,language"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in losses) == 6


def test_called_again_it_is_recognised_and_other_arguments_are_refused(trained, checkpoint, world):
    output, _ = trained
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert "already complete" in run(command(checkpoint, world, output)).stdout
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    refused = run(command(checkpoint, world, output, "--train_parts", "projector"), expect=2)
    assert "train_parts was 'vision,projector,language', now 'projector'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_killed_in_the_second_epoch_and_restarted_it_ends_with_the_same_weights(trained, checkpoint, world, tmp_path):
    straight, _ = trained
    output = tmp_path / "out"
    process = subprocess.Popen(command(checkpoint, world, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (output / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None, "finished before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "model.safetensors").exists()
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    run(command(checkpoint, world, output))
    first, second = load_file(straight / "model.safetensors"), load_file(output / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment_it_ends_with_the_same_weights(checkpoint, world, tmp_path):
    flags = ("--max_steps", "30", "--save_steps", "3")
    run(command(checkpoint, world, tmp_path / "straight", *flags))
    rng, kills = random.Random(0), 0
    while kills < 6:
        process = subprocess.Popen(
            command(checkpoint, world, tmp_path / "out", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(4, 9))  # from before the first step to the last
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills
    run(command(checkpoint, world, tmp_path / "out", *flags))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_preflight_says_what_will_happen(trained):
    output, _ = trained
    lines = (output / "preflight.txt").read_text()
    for part in ("records      12 (", "tokens       ", "image tokens ", "learned      ", "«", "global batch 4 = 4 a device",
                 "packs        ", "trains       vision 302,208", "memory       about", "work         "):  # fmt: skip
        assert part in lines, part


def test_dry_run_reports_and_touches_nothing(checkpoint, world, tmp_path):
    output = tmp_path / "out"
    result = run(command(checkpoint, world, output, "--dry_run"))
    assert "records" in result.stdout
    assert "global batch 4" in result.stdout
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", ""], "--data_path is missing"),
        (["--data_path", "nowhere.json"], "nowhere.json"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--train_parts", "head"], "'head'"),
        (["--lerning_rate", "1"], "unknown flag --lerning_rate"),
        (["--output_dir", "/dev/null/x"], "/dev/null"),
        (["--image_folder", "/nonexistent"], "image '/nonexistent"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, world, tmp_path, flags, message):
    result = run(command(checkpoint, world, tmp_path / "out", *flags), expect=2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr


def test_stage_one_trains_the_projector_alone(checkpoint, world, tmp_path):
    output = tmp_path / "align"
    run(command(checkpoint, world, output, "--train_parts", "projector", "--overview_only", "True"))
    first, second = load_file(checkpoint / "model.safetensors"), load_file(output / "model.safetensors")
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved
    assert all(name.startswith("model.projector.") for name in moved)


def test_an_unreadable_image_in_a_loader_worker_is_one_sentence_too(checkpoint, world, tmp_path):
    records = json.loads((world / "instructions.json").read_text())[:4]
    (world / "cut.png").write_bytes((world / records[0]["image"]).read_bytes()[:90])
    records[0]["image"] = "cut.png"
    (world / "cut.json").write_text(json.dumps(records))
    flags = ["--data_path", str(world / "cut.json"), "--dataloader_num_workers", "1"]
    result = run(command(checkpoint, world, tmp_path / "out", *flags), expect=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: record {records[0]['id']!r}: ")
    assert "cut.png" in line
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_no_number_stops_the_run(checkpoint, world, tmp_path):
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.projector.proj"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = run(command(broken, world, tmp_path / "out"), expect=2)
    assert "the loss of step 1 is no finite number; the 4 records of that batch are in" in result.stderr
    broken_batch = json.loads((tmp_path / "out" / "broken_batch.rank0.json").read_text())
    known = {record["id"] for record in json.loads((world / "few.json").read_text())}
    assert len(broken_batch["ids"]) == 4
    assert set(broken_batch["ids"]) <= known
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def preempted_and_continued(arguments, output, asked):
    """Ask the run to leave after its first steps; the same command then finishes it."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 240
    while not (output / "log.jsonl").is_file():
        assert process.poll() is None, "finished before it could be asked"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(asked)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-2000:]
    assert "asked to leave; saved at step" in errors
    assert json.loads((output / "run.json").read_text())["status"] == "preempted"
    assert not (output / "model.safetensors").exists()
    run(arguments)


@pytest.mark.parametrize("asked", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_asked_to_leave_it_saves_and_the_same_command_continues(trained, checkpoint, world, tmp_path, asked):
    straight, _ = trained
    output = tmp_path / "out"
    # no checkpoint of its own accord before the end; the signal comes while the first steps run
    flags = ("--save_steps", "100")
    preempted_and_continued(command(checkpoint, world, output, *flags), output, asked)
    first, second = load_file(straight / "model.safetensors"), load_file(output / "model.safetensors")
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_lora_ends_in_a_complete_checkpoint_that_moved_where_it_should(checkpoint, world, tmp_path):
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    from llava.model.load import load_model

    output = tmp_path / "out"
    flags = ("--lora_rank", "4", "--train_parts", "projector,language")
    run(command(checkpoint, world, output, *flags))
    before, after = load_model(checkpoint, torch.float32), load_model(output, torch.float32)  # strict
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    projector = {name for name in moved if name.startswith("model.projector.")}
    layers = moved - projector
    assert projector
    assert layers
    assert all(".self_attn." in name or ".mlp." in name for name in layers)
    assert all(name.startswith("model.language_model.layers.") for name in layers)


def test_four_bits_are_resumed_and_end_in_whole_weights(checkpoint, world, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    from llava.model.load import load_model

    flags = (
        "--lora_rank",
        "4",
        "--four_bit",
        "--gradient_checkpointing",
        "True",
        "--train_parts",
        "projector,language",
    )
    straight, output = tmp_path / "straight", tmp_path / "out"
    run(command(checkpoint, world, straight, *flags))
    preempted_and_continued(command(checkpoint, world, output, *flags, "--save_steps", "100"), output, signal.SIGUSR1)
    before, after = load_model(checkpoint, torch.float32), load_model(straight, torch.float32)  # strict
    weights = after.state_dict()
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert any(name.startswith("model.projector.") for name in moved)
    assert sum(".self_attn.q_proj.weight" in name for name in moved) == after.config.text_config.num_hidden_layers
    assert not any("norm" in name for name in moved if name.startswith("model.language_model"))
    for name, tensor in load_model(output, torch.float32).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_four_bits_alone_are_refused(checkpoint, world, tmp_path):
    result = run(command(checkpoint, world, tmp_path / "out", "--four_bit"), expect=2)
    assert "add --lora_rank 16" in result.stderr


def test_fsdp_on_a_cpu_is_refused(checkpoint, world, tmp_path):
    result = run(command(checkpoint, world, tmp_path / "out", "--fsdp", "full_shard"), expect=2)
    assert "quietly run plain data parallelism" in result.stderr


def test_records_without_an_answer_to_learn_are_refused(checkpoint, world, tmp_path):
    silent = tmp_path / "silent.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    silent.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(4)]))
    result = run(command(checkpoint, world, tmp_path / "out", "--data_path", str(silent)), expect=2)
    assert "every answer is empty. Fix: give the gpt turn a text" in result.stderr


def test_padded_rows_on_request(checkpoint, world, tmp_path):
    run(command(checkpoint, world, tmp_path / "out", "--packing", "False", "--max_steps", "2"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["counts"]["steps"] == 2
