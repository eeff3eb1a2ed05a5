"""The GPU benchmark runs where there is no GPU: small, or with one sentence."""

import json
import subprocess
import sys

import pytest
import torch

from llava.errors import run_command
from tests.gpu import generation
from tests.gpu.training import ROWS, main


@pytest.mark.slow
def test_tiny_run_fills_the_table(tmp_path):
    output = tmp_path / "table.json"
    command = [sys.executable, "-m", "tests.gpu.training", "--tiny", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "projector gradients at cosine" in done.stdout
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(ROWS)
    for row in rows:
        if "note" in row:
            assert "liger" in row["step"]
        else:
            assert row["samples/s"] > 0
            assert row["x padded"] > 0


@pytest.mark.slow
def test_tiny_generation_fills_the_table(tmp_path):
    output = tmp_path / "table.json"
    command = [sys.executable, "-m", "tests.gpu.generation", "--tiny", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(output.read_text())
    assert said["greedy tokens"] == "32 of 32 equal before a tie, 4 different answers of 4"
    assert len(said["rows"]) == len(generation.ROWS)
    for row in said["rows"]:
        assert row["tokens"] > 0
        assert row["x one by one"] > 0
        assert row["x batched"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training"])
    with pytest.raises(SystemExit) as left:
        run_command(main)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith("error: this benchmark wants a GPU")
    assert said.count("\n") == 1
