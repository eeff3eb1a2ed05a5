"""Sweeps over checkpoints and rounds: order, what is left out, what is not asked again, and the three files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.errors import UserError
from llava.eval import sweep
from llava.eval.benchmarks import score
from llava.eval.sweep import Point, chosen, merged, plot, points_of_run, read_run, round_labels, table_of
from llava.records import write_json

WHOLE = ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors", "trainer_state.json")


def write_evaluation(folder: Path, model: str, benchmarks: dict[str, str]) -> None:
    """What llava.eval.benchmarks leaves for a model; 1 is a question answered rightly, 0 wrongly."""
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    results = {}
    for name, outcomes in benchmarks.items():
        rows = [{"index": str(n), "question": "q", "A": "cat", "B": "dog", "answer": "A"} for n in range(len(outcomes))]
        answers = {str(n): "A" if outcome == "1" else "B" for n, outcome in enumerate(outcomes)}
        predictions, results[name] = score(name, rows, answers, None)
        (folder / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
    write_json(folder / "results.json", {"model": model, "benchmarks": results})
    inputs = {model: sweep.fingerprint(Path(model))}
    write_json(folder / "run.json", {"status": "complete", "arguments": {"model": model}, "inputs": inputs})


def make_checkpoint(folder: Path, without: str = "") -> Path:
    folder.mkdir(parents=True)
    for name in set(WHOLE) - {without}:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def training(tmp_path) -> Path:
    """A training that goes on, with two checkpoints."""
    folder = tmp_path / "training"
    for step in (10, 9):
        make_checkpoint(folder / f"checkpoint-{step}")
    state = {"stage": "train", "status": "running", "started": 1, "counts": {}, "inputs": {}}
    write_json(folder / "run.json", {**state, "arguments": {"lora_rank": 0}})
    return folder


def complete(training: Path, steps: int) -> None:
    """What a training does at its end: the model in its folder, no checkpoints."""
    state = json.loads((training / "run.json").read_text())
    write_json(training / "run.json", {**state, "status": "complete", "counts": {"steps": steps}})
    for checkpoint in training.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in WHOLE:
        (training / name).write_text("{}")


class Evaluations:
    """Stands in for the evaluation command: remembers what it was asked for, fails for one name, answers by hand."""

    def __init__(self):
        self.asked: list[str] = []
        self.flags: list[str] = []
        self.outcomes = {"step-9": {"MMStar": "1100000000", "Own": "1111"}}
        self.fails_at = ""

    def __call__(self, model: Path, folder: Path, flags: list[str]) -> int:
        self.asked.append(folder.name)
        self.flags = flags
        if folder.name == self.fails_at:
            return 3
        write_evaluation(folder, str(model), self.outcomes.get(folder.name, {"MMStar": "1011100000", "Own": "1111"}))
        return 0


@pytest.fixture
def evaluations(monkeypatch) -> Evaluations:
    found = Evaluations()
    monkeypatch.setattr(sweep, "run_benchmarks", found)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    return found


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command, in this process; returns its folder."""
    data = tmp_path / "MMStar.tsv"
    data.write_text("index\timage\tquestion\tA\tB\tanswer\n0\t-\tq\tcat\tdog\tA\n1\t-\tq\tcat\tdog\tA\n")

    def call(*flags: str | Path) -> Path:
        common = ["--data_path", str(data), "--output_dir", str(tmp_path / "sweep")]
        monkeypatch.setattr(sys, "argv", ["sweep", *common, *map(str, flags)])
        sweep.main()
        return tmp_path / "sweep"

    return call


def test_the_files_hold_what_was_measured_in_order_of_step(run, training, evaluations, capsys):
    output = run("--run", training, "--max_new_tokens", "6", "--judge", "gpt")
    assert evaluations.asked == ["step-9", "step-10"]
    assert evaluations.flags[:4] == ["--max_new_tokens", "6", "--judge", "gpt"]
    # Wilson: 2 of 10, 4 of 10, 4 of 4
    rounded = [
        {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        for row in json.loads((output / "sweep.json").read_text())
    ]
    assert rounded == [
        {"name": "step-9", "step": 9, "benchmark": "MMStar", "value": 20.0, "low": 5.7, "high": 51.0},
        {"name": "step-9", "step": 9, "benchmark": "Own", "value": 100.0, "low": 51.0, "high": 100.0},
        {"name": "step-10", "step": 10, "benchmark": "MMStar", "value": 40.0, "low": 16.8, "high": 68.7},
        {"name": "step-10", "step": 10, "benchmark": "Own", "value": 100.0, "low": 51.0, "high": 100.0},
    ]
    text = (output / "sweep.md").read_text()
    header, _, star, own, average, *_ = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert header == ["benchmark", "n", "step-9", "step-10", "step-10 - step-9", "p"]
    assert star[:4] == ["MMStar", "10", "20.0 (5.7 to 51.0)", "**40.0 (16.8 to 68.7)**"]
    assert star[4].startswith("+20.0 (")
    assert float(star[5]) == pytest.approx(10 / 16, abs=0.02)
    assert own[4:] == ["+0.0 (+0.0 to +0.0)", "1.000"]
    assert average == ["average", "of 2", "60.0", "70.0", "+10.0", ""]
    assert f"* step-9: {output}/step-9\n* step-10: {output}/step-10\n* MMStar, Own: accuracy; exact match" in text
    assert capsys.readouterr().out.endswith(f"-> {output}/sweep.md\n")
    assert Image.open(output / "sweep.png").width == 1200


def test_only_the_last_one_is_compared_and_all_have_their_average(tmp_path):
    for number, outcomes in enumerate(("1000", "1100", "1110")):
        write_evaluation(tmp_path / f"r{number}", str(tmp_path), {"MMStar": outcomes})
    points = [Point(f"r{number}", number, None) for number in range(3)]
    table = table_of(points, tmp_path)
    assert table.columns == list(table.sources) == ["r0", "r1", "r2"]
    assert list(table.differences) == [("MMStar", "r2")]
    assert table.averages == {"r0": 25, "r1": 50, "r2": 75}


def test_what_was_measured_stays_when_training_deletes_its_checkpoints(run, training, evaluations):
    run("--run", training)
    complete(training, steps=12)
    output = run("--run", f"{training}/")
    assert evaluations.asked == ["step-9", "step-10", "step-12"]
    measured = json.loads((output / "sweep.json").read_text())
    assert [(row["step"], row["benchmark"]) for row in measured[::2]] == [(9, "MMStar"), (10, "MMStar"), (12, "MMStar")]
    before = (output / "sweep.json").read_bytes()
    run("--run", training)
    assert len(evaluations.asked) == 3
    assert (output / "sweep.json").read_bytes() == before


def test_another_training_in_the_same_folder_is_not_mixed_in(run, training, evaluations):
    run("--run", training)
    state = json.loads((training / "run.json").read_text())
    write_json(training / "run.json", {**state, "started": 2})
    with pytest.raises(UserError, match="training_started was 1, now 2"):
        run("--run", training)


def test_a_sweep_that_stopped_goes_on_where_it_was(run, training, evaluations):
    evaluations.fails_at = "step-10"
    with pytest.raises(UserError, match="evaluation of step-10 failed with status 3"):
        run("--run", training)
    assert json.loads((training.parent / "sweep" / "run.json").read_text())["status"] == "failed"
    evaluations.fails_at = ""
    output = run("--run", training)
    assert evaluations.asked == ["step-9", "step-10", "step-10"]
    assert json.loads((output / "run.json").read_text())["counts"] == {
        "checkpoints": 2, "newly_evaluated": 1, "benchmarks": 2,
    }  # fmt: skip


def test_incomplete_checkpoints_are_left_out_with_the_reason(run, training, evaluations, capsys):
    make_checkpoint(training / "checkpoint-11", without="model.safetensors")
    make_checkpoint(training / "checkpoint-12", without="trainer_state.json")
    write_json(training.parent / "sweep" / "step-8" / "run.json", {"status": "running"})
    write_json(
        training.parent / "sweep" / "run.json", {"status": "failed", "stage": "x", "arguments": {}, "inputs": {}}
    )
    (training.parent / "sweep" / "run.json").unlink()
    shutil.rmtree(training.parent / "sweep")
    run("--run", training)
    printed = capsys.readouterr().out
    assert "step-11 left out: it is incomplete: no model*.safetensors" in printed
    assert "step-12 left out: it is incomplete: no trainer_state.json" in printed
    write_json(training.parent / "sweep" / "step-8" / "run.json", {"status": "running"})
    run("--run", training)
    assert "step-8 left out: its evaluation was cut off, and the checkpoint is gone" in capsys.readouterr().out
    assert evaluations.asked == ["step-9", "step-10"]
    with pytest.raises(UserError, match=r"no checkpoint of .* can be evaluated"):
        run("--run", training, "--steps", "11,12")


def test_a_checkpoint_that_training_deletes_meanwhile_is_left_out(run, training, evaluations, capsys, monkeypatch):
    def deleted(model, folder, flags):
        if model.name == "checkpoint-9":
            shutil.rmtree(model)
            return 2
        return evaluations(model, folder, flags)

    monkeypatch.setattr(sweep, "run_benchmarks", deleted)
    run("--run", training)
    assert "step-9 left out: training deleted it meanwhile" in capsys.readouterr().out
    assert evaluations.asked == ["step-10"]


def test_an_evaluation_cut_off_under_a_checkpoint_that_became_the_model_is_begun_anew(run, training, evaluations):
    evaluations.fails_at = "step-10"
    with pytest.raises(UserError, match="the evaluation of step-10 failed"):
        run("--run", training)
    evaluations.fails_at, evaluations.asked = "", []
    complete(training, 10)
    begun = training.parent / "sweep" / "step-10"
    state = {"stage": "evaluate", "status": "failed", "inputs": {}, "arguments": {"model": "training/checkpoint-10"}}
    write_json(begun / "run.json", state)
    (begun / "half").touch()
    run("--run", training)
    assert evaluations.asked == ["step-10"]
    assert not (begun / "half").exists()


def test_which_steps_are_chosen():
    points = [Point(f"step-{step}", step, None) for step in (500, 1000, 1500, 2000, 2300)]

    def steps(*choice) -> list[int]:
        return [point.step for point in chosen(points, *choice)]

    assert steps(None, None) == [500, 1000, 1500, 2000, 2300]
    assert steps(None, 1000) == [1000, 2000, 2300]
    assert steps("1500,500", None) == [500, 1500]
    with pytest.raises(UserError, match=r"no checkpoint at step '700'\. Fix: one of 500, 1000, 1500, 2000, 2300"):
        steps("500,700", None)


def test_a_dry_run_lists_and_writes_nothing(run, training, evaluations, capsys):
    output = run("--run", training, "--dry_run")
    assert capsys.readouterr().out.splitlines() == [
        "MMStar       2 questions",
        f"step-9       evaluate {training}/checkpoint-9",
        f"step-10      evaluate {training}/checkpoint-10",
        f"writes       {output}/sweep.md, sweep.json, sweep.png (nothing was written)",
    ]
    assert not output.exists()


def test_rounds_keep_their_order_and_a_further_one_is_added(run, evaluations, tmp_path):
    rounds = [f"{name}={make_checkpoint(tmp_path / name)}" for name in ("zero", "first", "another")]
    run("--checkpoints", *rounds[:2])
    output = run("--checkpoints", *rounds)
    assert evaluations.asked == ["zero", "first", "another"]
    measured = json.loads((output / "sweep.json").read_text())
    assert [(row["name"], row["step"]) for row in measured[::2]] == [("zero", 0), ("first", 1), ("another", 2)]


def test_a_round_stands_for_one_folder_and_its_weights(run, evaluations, tmp_path):
    first, other = make_checkpoint(tmp_path / "first"), make_checkpoint(tmp_path / "other")
    run("--checkpoints", f"a={first}")
    with pytest.raises(UserError, match=f"is the evaluation of {first}, not of {other}"):
        run("--checkpoints", f"a={other}")
    (first / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match="changed since it was evaluated"):
        run("--checkpoints", f"a={first}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --run or --checkpoints"),
        (["--run", "nowhere"], "nowhere is no folder of a training run"),
        (["--run", "EMPTY"], "has no checkpoint-<step> yet"),
        (["--run", "RUN", "--steps", "9,11"], "no checkpoint at step '11'. Fix: one of 9, 10"),
        (["--run", "RUN", "--every", "0"], "--every 0 is no number of steps"),
        (["--run", "RUN", "--every", "1", "--steps", "9"], "exclude each other"),
        (["--checkpoints", "a=RUN/checkpoint-9", "a=RUN/checkpoint-10"], "names 'a' twice"),
        (["--checkpoints", "RUN"], "wants NAME=FOLDER"),
        (["--checkpoints", "../a=RUN/checkpoint-9"], "wants NAME=FOLDER"),
        (["--checkpoints", "a=RUN"], "is no checkpoint folder: no config.json"),
        (["--checkpoints", "a=RUN/checkpoint-9", "--every", "2"], "choose among the checkpoints of --run"),
        (["--run", "RUN", "--data_path", "EMPTY"], "holds no .tsv file"),
    ],
)
def test_bad_input_is_refused(run, training, evaluations, tmp_path, flags, message):
    write_json(tmp_path / "empty" / "run.json", json.loads((training / "run.json").read_text()))
    places = {"RUN": str(training), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    with pytest.raises(UserError) as error:
        run(*flags)
    assert message in str(error.value)
    assert not evaluations.asked
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("points", "benchmarks"), [(1, 1), (2, 5), (4, 13)])
def test_the_plot_has_a_panel_for_every_benchmark(tmp_path, monkeypatch, points, benchmarks):
    from matplotlib import pyplot

    drawn = [Point(f"step-{10 * number}", 10 * number, None) for number in range(points)]
    for number, point in enumerate(drawn):
        outcomes = {f"Own{letter}": "1" * number + "0" * (4 - number) for letter in range(benchmarks)}
        write_evaluation(tmp_path / point.name, str(tmp_path), outcomes)
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot(table_of(drawn, tmp_path), drawn, tmp_path / "sweep.png", rounds=False)
    monkeypatch.undo()
    [figure] = figures
    assert [axis.get_title() for axis in figure.axes] == [f"Own{number} (n = 4)" for number in range(benchmarks)]
    assert {axis.get_ylabel() for axis in figure.axes} == {"accuracy"}
    assert list(figure.axes[0].lines[0].get_ydata()) == [25 * number for number in range(points)]
    pyplot.close(figure)
    assert Image.open(tmp_path / "sweep.png").width == 1200


def test_rounds_are_named_on_the_axis_where_there_is_room():
    points = [Point("base", 0, None), Point("round-1", 1, None)]
    assert round_labels(points, 18) == (["base", "round-1"], "round")
    assert round_labels(points, 17) == (["0", "1"], "round: 0 = base, 1 = round-1")


# The real thing


def command(world: Path, output: Path, *flags) -> list[str]:
    data = f"{world}/benchmarks/ToyVQA.tsv"
    return [
        sys.executable, "-m", "llava.eval.sweep", "--data_path", data, "--output_dir", str(output),
        "--max_new_tokens", "4", *map(str, flags),
    ]  # fmt: skip


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_checkpoint_is_evaluated_for_real_and_once(checkpoint, world, tmp_path):
    arguments = command(world, tmp_path / "out", "--checkpoints", f"base={checkpoint}")
    assert "1 checkpoints, 1 newly evaluated, 1 benchmarks" in finish(arguments)
    result = json.loads((tmp_path / "out" / "base" / "results.json").read_text())["benchmarks"]["ToyVQA"]
    [measured] = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (measured["value"], measured["low"], measured["high"]) == (result["value"], result["low"], result["high"])
    again = finish(arguments)
    assert "base is complete" in again
    assert "1 checkpoints, 0 newly evaluated, 1 benchmarks" in again


def train(checkpoint: Path, world: Path, output: Path, *flags: str) -> Path:
    """Three steps, whose checkpoints stay."""
    few = world / "few.json"
    few.write_text(json.dumps(json.loads((world / "instructions.json").read_text())[:12]))
    finish([
        sys.executable, "-m", "llava.train.sft", "--model_name_or_path", str(checkpoint), "--data_path", str(few),
        "--output_dir", str(output), "--per_device_train_batch_size", "4", "--learning_rate", "1e-2",
        "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "9", "--dataloader_num_workers", "0", *flags,
    ])  # fmt: skip
    return output


@pytest.mark.slow
def test_a_training_is_swept_stopped_and_swept_to_its_end(checkpoint, world, tmp_path):
    trained, output = train(checkpoint, world, tmp_path / "training"), tmp_path / "out"
    process = subprocess.Popen(command(world, output, "--run", trained), stderr=subprocess.DEVNULL)
    first, second = output / "step-1" / "run.json", output / "step-2" / "run.json"
    deadline = time.time() + 240
    while not second.is_file():
        assert process.poll() is None, "finished before it could be stopped"
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert json.loads(first.read_text())["status"] == "complete"
    assert json.loads(second.read_text())["status"] != "complete"
    before = first.stat().st_mtime_ns
    assert "3 checkpoints, 2 newly evaluated" in finish(command(world, output, "--run", trained))
    assert first.stat().st_mtime_ns == before
    evaluated = [json.loads((output / f"step-{step}" / "results.json").read_text())["model"] for step in (1, 2, 3)]
    assert evaluated == [f"{trained}/checkpoint-1", f"{trained}/checkpoint-2", str(trained)]
    measured = (output / "sweep.json").read_bytes()
    for checkpoint_folder in trained.glob("checkpoint-*"):
        shutil.rmtree(checkpoint_folder)
    assert "3 checkpoints, 0 newly evaluated" in finish(command(world, output, "--run", trained))
    assert (output / "sweep.json").read_bytes() == measured


@pytest.mark.slow
def test_loras_checkpoints_are_merged_as_training_merges_them(checkpoint, world, tmp_path):
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    from llava.model.load import load_model

    trained = train(checkpoint, world, tmp_path / "lora", "--lora_rank", "4", "--train_parts", "projector,language")
    state, output = read_run(trained), tmp_path / "out"
    assert [point.problem for point in points_of_run(trained, state, output)] == ["", "", ""]
    whole = load_model(merged(trained / "checkpoint-3", state, tmp_path / "merged"), torch.float32)
    expected = load_model(trained, torch.float32).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    before = sorted(os.walk(trained))
    assert "2 checkpoints, 2 newly evaluated" in finish(command(world, output, "--run", trained, "--steps", "1,3"))
    assert sorted(os.walk(trained)) == before
    assert not (output / ".merged").exists()
