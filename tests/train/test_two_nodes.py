"""Two nodes: network namespaces joined by one cable (a veth pair), a launch of the stage script in each, and a cut."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from llava.records import read_jsonl
from tests.train.test_distributed import command, environment

STEPS = 40
TIMEOUT = 30  # seconds that a rank waits for the other one; a cut sends no goodbye, so nothing else ends the wait
GRACE = 30  # seconds from that to the end of the launch; 4 are usual
FLAGS = ("--max_steps", str(STEPS), "--ddp_timeout", str(TIMEOUT))

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def nodes():
    """Names of two fresh namespaces, 10.200.0.1 and 10.200.0.2 on `eth0`. Whatever runs in them at the end is killed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("not root, or no `ip` (package iproute2): TWO NODES WERE NOT TESTED")
    names = [f"sicog{os.getpid()}node{rank}" for rank in (0, 1)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for rank, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.200.0.{rank + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
                ip("netns", "exec", name, "true")
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"{' '.join(refused.cmd)}: {refused.stderr.strip()}: TWO NODES WERE NOT TESTED")
        yield names
    finally:
        for name in made:
            for process in ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", name)


def settings(checkpoint, world, output, **variables) -> dict[str, str]:
    """Twelve records, a global batch of four, a checkpoint every other step; on the CPU wherever the test runs."""
    few = world / "twelve.json"
    few.write_text(json.dumps(json.loads((world / "instructions.json").read_text())[:12]))
    return environment(
        checkpoint, world, output, DATA_PATH=str(few), FINETUNE_BATCH="2", GLOBAL_BATCH_SIZE="4", SAVE_STEPS="2",
        CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", **variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(checkpoint, world, tmp_path_factory):
    """The same training by two processes of one host, never interrupted."""
    output = tmp_path_factory.mktemp("straight") / "out"
    variables = settings(checkpoint, world, output, NPROC_PER_NODE="2")
    result = subprocess.run(command(*FLAGS), env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return output


def launch(nodes, checkpoint, world, output) -> list[subprocess.Popen]:
    """One launch in every node; what it says goes to OUTPUT.nodeN.log."""
    launches = []
    for rank, name in enumerate(nodes):
        variables = settings(
            checkpoint, world, output, NNODES="2", NODE_RANK=str(rank), NPROC_PER_NODE="1",
            MASTER_ADDR="10.200.0.1", GLOO_SOCKET_IFNAME="eth0",
        )  # fmt: skip
        with log_of(output, rank).open("w") as log:
            inside = ["ip", "netns", "exec", name, *command(*FLAGS)]
            launches.append(subprocess.Popen(inside, env=variables, stdout=log, stderr=subprocess.STDOUT))
    return launches


def log_of(output, rank):
    return output.with_name(f"{output.name}.node{rank}.log")


def statuses(launches, output, seconds: float) -> list[int]:
    """Exit statuses of both launches, which must all be there within that time."""
    deadline = time.time() + seconds
    while any(node.poll() is None for node in launches):
        if time.time() > deadline:
            logs = "\n".join(log_of(output, rank).read_text()[-1500:] for rank in (0, 1))
            pytest.fail(f"a launch still runs after {seconds:.0f} s: {[node.poll() for node in launches]}\n{logs}")
        time.sleep(0.1)
    return [node.returncode for node in launches]


def same_training(first, second) -> None:
    """Bit-equal weights, every step logged once, and a folder that says it is complete."""
    assert json.loads((second / "run.json").read_text())["status"] == "complete"
    assert [row["step"] for row in read_jsonl(second / "log.jsonl") if "loss" in row] == list(range(1, STEPS + 1))
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_two_nodes_end_with_the_weights_of_two_processes_on_one_host(nodes, straight, checkpoint, world, tmp_path):
    output = tmp_path / "out"
    assert statuses(launch(nodes, checkpoint, world, output), output, 600) == [0, 0]
    same_training(straight, output)


def test_a_cut_cable_ends_both_launches_and_healed_they_continue(nodes, straight, checkpoint, world, tmp_path):
    output = tmp_path / "out"
    launches = launch(nodes, checkpoint, world, output)
    deadline = time.time() + 240
    while not (output / "checkpoint-4" / "trainer_state.json").is_file():
        assert all(node.poll() is None for node in launches), "finished before the cable could be cut"
        assert time.time() < deadline
        time.sleep(0.02)
    ip("-n", nodes[1], "link", "set", "eth0", "down")
    assert 0 not in statuses(launches, output, TIMEOUT + GRACE)

    assert json.loads((output / "run.json").read_text())["status"] == "failed"
    assert not (output / "model.safetensors").exists()
    assert 4 <= [row["step"] for row in read_jsonl(output / "log.jsonl") if "loss" in row][-1] < STEPS
    for rank in (0, 1):
        assert "gloo/transport/tcp" in log_of(output, rank).read_text()  # gloo gave up, and not something else broke

    ip("-n", nodes[1], "link", "set", "eth0", "up")
    assert statuses(launch(nodes, checkpoint, world, output), output, 600) == [0, 0]
    assert "continuing from " in log_of(output, 0).read_text()
    same_training(straight, output)
