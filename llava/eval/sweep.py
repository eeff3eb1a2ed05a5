"""Benchmarks over the checkpoints of a training run, or over rounds of self-improvement: table, numbers, plot.

    python -m llava.eval.sweep --run model_weight/sicog --data_path data/MMStar.tsv --output_dir runs/sweep
    python -m llava.eval.sweep --checkpoints base=A round1=B round2=C --data_path data --output_dir runs/rounds

    reads   --run: its checkpoint-<step> folders in order of step, then the finished model at its last step;
            --checkpoints: checkpoint folders in the order given, rounds 0, 1, ...
    writes  <output_dir>/step-<step> or <output_dir>/<name>   run folders of llava.eval.benchmarks
            sweep.md      a row a benchmark, a column a checkpoint; the last one's difference to the first with its p
            sweep.json    a list of name, step (or round), benchmark, value, low, high
            sweep.png     a panel a benchmark: the number with its 95% interval over steps or rounds

What is complete is not evaluated again. Training keeps its two newest checkpoints, and none once it is finished, unless
`--save_total_limit 20` keeps more (`--save_only_model True` makes them small, but then nothing can be resumed). A sweep
that is started again while training goes on adds what is new, and keeps what it measured of checkpoints that are gone.
LoRA's checkpoints hold only what trains; they are merged into the model that the run started from while they are asked.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError, run_command
from llava.records import write_atomically, write_json
from llava.runs import fingerprint, open_run, read_state

if TYPE_CHECKING:
    from llava.eval.report import Table

HANDED_ON = ("batch_size", "max_new_tokens", "judge", "judge_base_url")  # to llava.eval.benchmarks, which has defaults
LAST_SAVED = "trainer_state.json"  # the Trainer writes it at the end of a checkpoint


@dataclass(frozen=True)
class Point:
    """A checkpoint of the sweep.

    Attributes:
        step: of training, or the number of the round.
        folder: None when it is gone and only its evaluation is left.
        problem: why it cannot be evaluated, or "".
    """

    name: str
    step: int
    folder: Path | None
    problem: str = ""


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a training run."""
    state = read_state(folder) if (folder / "run.json").is_file() else None
    if state is None or "lora_rank" not in state["arguments"]:
        raise UserError(f"{folder} is no folder of a training run: no run.json of one. Fix: check --run")
    return state


def points_of_run(folder: Path, training: dict[str, Any], output: Path) -> list[Point]:
    """What can be asked of a training run: checkpoints there are, were evaluated before, or ended it; by step."""
    found: dict[int, Point] = {}
    for step, evaluation in numbered(output, "step"):
        gone = "its evaluation was cut off, and the checkpoint is gone"
        found[step] = Point(f"step-{step}", step, None, "" if evaluation_of(evaluation) else gone)
    for step, checkpoint in numbered(folder, "checkpoint"):
        found[step] = Point(f"step-{step}", step, checkpoint, problem(checkpoint, training))
    if training["status"] == "complete":
        step = training["counts"]["steps"]
        found[step] = Point(f"step-{step}", step, folder)
    if not found:
        raise UserError(
            f"{folder} has no checkpoint-<step> yet, and its training is not complete. Fix: wait for the first "
            "(--save_steps of training), or continue the training"
        )
    return [found[step] for step in sorted(found)]


def numbered(folder: Path, start: str) -> list[tuple[int, Path]]:
    """(step, folder) of all folders <start>-<step>."""
    matches = [
        (re.fullmatch(rf"{start}-(\d+)", path.name), path) for path in folder.glob(f"{start}-*") if path.is_dir()
    ]
    return [(int(match[1]), path) for match, path in matches if match]


def problem(checkpoint: Path, training: dict[str, Any]) -> str:
    """Why a Trainer's checkpoint cannot be opened, or "". LoRA's holds the weights that train and nothing else."""
    needed = [LAST_SAVED]
    if not training["arguments"]["lora_rank"]:
        needed += ["config.json", "processor_config.json", "tokenizer.json"]
    if missing := [name for name in needed if not (checkpoint / name).is_file()]:
        return f"it is incomplete: no {missing[0]}"
    return "" if any(checkpoint.glob("model*.safetensors")) else "it is incomplete: no model*.safetensors"


def points_of_rounds(items: list[str]) -> list[Point]:
    points: list[Point] = []
    for item in items:
        name, _, folder = item.partition("=")
        if not re.fullmatch(r"\w[\w.+-]*", name) or not folder:
            raise UserError(f"--checkpoints wants NAME=FOLDER, not {item!r}. Fix: NAME of letters, digits, . + - _")
        if name in [point.name for point in points]:
            raise UserError(f"--checkpoints names {name!r} twice. Fix: give every round a name of its own")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is no checkpoint folder: no config.json. Fix: check --checkpoints {name}=")
        points.append(Point(name, len(points), Path(folder)))
    return points


def chosen(points: list[Point], steps: str | None, every: int | None) -> list[Point]:
    """The points at `steps`, or those that `every` divides and the last. Raises UserError for a step that is not there."""
    if steps:
        known = {str(point.step): point for point in points}
        if unknown := [step for step in steps.split(",") if step not in known]:
            raise UserError(f"--steps: there is no checkpoint at step {unknown[0]!r}. Fix: one of {', '.join(known)}")
        return [point for point in points if str(point.step) in steps.split(",")]
    return [point for point in points if not every or point.step % every == 0 or point is points[-1]]


def evaluation_of(folder: Path) -> dict[str, Any] | None:
    """The run.json of a complete evaluation, None when there is none."""
    state = read_state(folder) if (folder / "run.json").is_file() else None
    return state if state and state["status"] == "complete" else None


def refuse_other_model(point: Point, state: dict[str, Any], folder: Path) -> None:
    """A round's name stands for the folder, and the weights, that were evaluated under it."""
    model = state["arguments"]["model"]
    if model != str(point.folder):
        raise UserError(
            f"{folder} is the evaluation of {model}, not of {point.folder}. Fix: another name, or delete it"
        )
    if fingerprint(point.folder) != state["inputs"][model]:
        raise UserError(f"{model} changed since it was evaluated. Fix: delete {folder}, or name another --output_dir")


def evaluate(point: Point, training: dict[str, Any] | None, output: Path, flags: list[str]) -> bool:
    """Evaluate a checkpoint unless that is done; False, with the reason printed, when it cannot be.

    Raises:
        UserError: the evaluation failed though the checkpoint is there.
    """
    folder = output / point.name
    if state := evaluation_of(folder):
        if training is None:
            refuse_other_model(point, state, folder)
        print(f"[sweep] {point.name} is complete", flush=True)
        return True
    if point.problem or not point.folder.is_dir():
        print(f"[sweep] {point.name} left out: {point.problem or 'the checkpoint is gone'}", flush=True)
        return False
    print(f"[sweep] {point.name} <- {point.folder}", flush=True)
    model = point.folder
    if not (model / "config.json").is_file():
        model = merged(point.folder, training, output / ".merged" / point.name)
    begun = read_state(folder) if (folder / "run.json").is_file() else None
    if (
        training and begun and begun["arguments"]["model"] != str(model)
    ):  # of a checkpoint that is the finished model now
        shutil.rmtree(folder)
    status = run_benchmarks(model, folder, flags)
    if status and not point.folder.is_dir():
        print(f"[sweep] {point.name} left out: training deleted it meanwhile", flush=True)
        return False
    if status:
        raise UserError(
            f"the evaluation of {point.name} failed with status {status}; what it said is above. "
            "Fix: see there; the same command then continues"
        )
    shutil.rmtree(output / ".merged", ignore_errors=True)
    return True


def run_benchmarks(model: Path, folder: Path, flags: list[str]) -> int:
    command = [sys.executable, "-m", "llava.eval.benchmarks", "--model_name_or_path", str(model)]
    return subprocess.run([*command, "--output_dir", str(folder), *flags], check=False).returncode


def merged(checkpoint: Path, training: dict[str, Any], folder: Path) -> Path:
    """The whole model of a LoRA checkpoint: the one its run started from, with the additions merged in."""
    if folder.is_dir():  # of an evaluation that was interrupted
        return folder
    import torch
    from safetensors.torch import load_file

    from llava.model.load import load_model, load_processor
    from llava.train.lora import add_lora, merge

    arguments = training["arguments"]
    start = arguments["model_name_or_path"]
    if fingerprint(Path(start)) != training["inputs"][start]:
        raise UserError(f"{start} changed since {checkpoint} was trained from it. Fix: put back what it was")
    model = load_model(start, torch.float32)
    lora = add_lora(model, arguments["lora_rank"], arguments["lora_alpha"] or 2 * arguments["lora_rank"], 0.0)
    trained = load_file(checkpoint / "model.safetensors")
    report = model.load_state_dict(trained, strict=False)
    if wrong := [*report.unexpected_keys, *(name for name in report.missing_keys if "lora_" in name)]:
        raise UserError(f"{checkpoint} does not fit {start}: {wrong[0]!r}. Fix: see --lora_rank in the run's run.json")
    merge(lora)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    load_processor(start).save_pretrained(partial)
    return partial.rename(folder)


def table_of(points: list[Point], output: Path) -> "Table":
    """Numbers of all points, and the last one's differences to the first."""
    from llava.eval.report import build

    folders = {point.name: output / point.name for point in points}
    first, *between, last = [points[0].name, *(point.name for point in points[1:-1]), points[-1].name]
    table = build({name: folders[name] for name in (first, last)}, [])
    for name in between:  # alone: comparisons are what takes time
        alone = build({name: folders[name]}, [])
        table.entries |= alone.entries
        table.averages |= alone.averages
    table.columns, table.sources = list(folders), {name: str(folder) for name, folder in folders.items()}
    return table


def write_table(table: "Table", points: list[Point], output: Path) -> str:
    """Write sweep.json and sweep.md; returns the latter's table."""
    from llava.eval.report import cells, markdown, notes

    entries = [(point, row, table.entries[row, point.name]) for point in points for row in table.rows]
    write_json(
        output / "sweep.json",
        [
            {"name": point.name, "step": point.step, "benchmark": row, "value": entry.value, "low": entry.low, "high": entry.high}
            for point, row, entry in entries
        ],
    )  # fmt: skip
    text = markdown(cells(table))
    write_atomically(output / "sweep.md", [text, "\n", *(f"* {line}\n" for line in notes(table))])
    return text


def plot(table: "Table", points: list[Point], path: Path, rounds: bool) -> None:
    """Draw a panel a benchmark, 1200 pixels wide: numbers with 95% intervals; dotted where the first one was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    count = len(table.rows)
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(12, 0.9 + 2.8 * lines), layout="constrained", squeeze=False, sharex=True
    )
    steps = [point.step for point in points]
    for axis, row in zip(axes.flat, table.rows, strict=False):
        entries = [table.entries[row, point.name] for point in points]
        values, low, high = ([getattr(entry, name) for entry in entries] for name in ("value", "low", "high"))
        axis.fill_between(steps, low, high, color="#93b4f5", alpha=0.4, linewidth=0)
        axis.vlines(steps, low, high, color="#2563eb", linewidth=0.8)
        axis.plot(steps, values, color="#1e3a8a", marker="o", markersize=4)
        axis.axhline(values[0], color="#374151", linestyle=":", linewidth=1)
        bottom, top = min(low), max(*high, min(low) + 2)  # two points at least: less is nothing
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
        axis.set_title(f"{row} (n = {entries[0].questions:,})", fontsize=11)
        axis.set_ylabel(entries[0].metric)
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes.flat[count:]:
        axis.remove()
    shared = axes[0, 0]
    margin = 0.04 * (steps[-1] - steps[0]) or 0.5
    shared.set_xlim(steps[0] - margin, steps[-1] + margin)
    if rounds:
        labels, below = round_labels(points, room=130 // columns)
        shared.set_xticks(steps, labels)
    else:
        below = "step of training"
        shared.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        shared.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.supxlabel(below, fontsize=10)
    figure.suptitle("line: value; band: 95% interval; dotted: value of the first checkpoint", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def round_labels(points: list[Point], room: int) -> tuple[list[str], str]:
    """Labels of the rounds and of their axis: names where `room` characters hold them side by side, else numbers."""
    names = [point.name for point in points]
    if len(names) * (2 + max(map(len, names))) <= room:
        return names, "round"
    explained = ", ".join(f"{point.step} = {point.name}" for point in points)
    return [str(point.step) for point in points], textwrap.fill(f"round: {explained}", 150)


def tsv_files(data_path: str) -> list[Path]:
    paths = sorted(Path(data_path).glob("*.tsv")) if Path(data_path).is_dir() else list(map(Path, data_path.split(",")))
    if not paths:
        raise UserError(f"{data_path} holds no .tsv file. Fix: set --data_path to VLMEvalKit TSV files")
    return paths


def dry_run(points: list[Point], paths: list[Path], output: Path) -> None:
    from llava.eval.questions import read_tsv

    for path in paths:
        print(f"{path.stem:12} {len(read_tsv(path)):,} questions")
    for point in points:
        done = evaluation_of(output / point.name)
        what = "complete" if done else f"left out: {point.problem}" if point.problem else f"evaluate {point.folder}"
        print(f"{point.name:12} {what}")
    print(f"writes       {output}/sweep.md, sweep.json, sweep.png (nothing was written)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="a training run's folder")
    parser.add_argument("--checkpoints", nargs="+", metavar="NAME=FOLDER", help="rounds instead, in their order")
    parser.add_argument("--data_path", required=True, help="TSV files, comma-separated, or a folder of them")
    parser.add_argument("--output_dir", required=True, help="folder of the sweep")
    parser.add_argument("--steps", help="of --run, only these: 500,1000")
    parser.add_argument("--every", type=int, help="of --run, only steps that this number divides, and the last")
    for name in HANDED_ON:
        parser.add_argument(f"--{name}", help="as in llava.eval.benchmarks")
    parser.add_argument("--dry_run", action="store_true", help="list what would be evaluated, evaluate nothing")
    arguments = parser.parse_args()
    if bool(arguments.run) == bool(arguments.checkpoints):
        raise UserError(
            "give --run or --checkpoints. Fix: --run FOLDER of a training, or --checkpoints NAME=FOLDER ..."
        )
    if arguments.checkpoints and (arguments.steps or arguments.every is not None):
        raise UserError("--steps and --every choose among the checkpoints of --run. Fix: leave out rounds by hand")
    if arguments.steps and arguments.every is not None:
        raise UserError("--steps and --every exclude each other. Fix: drop one")
    if arguments.every is not None and arguments.every < 1:
        raise UserError(f"--every {arguments.every} is no number of steps. Fix: 1 or more")
    return arguments


def main() -> None:
    arguments = parse()
    output, paths = Path(arguments.output_dir), tsv_files(arguments.data_path)
    trained = Path(arguments.run) if arguments.run else None
    training = read_run(trained) if trained else None
    if training:
        points = chosen(points_of_run(trained, training, output), arguments.steps, arguments.every)
    else:
        points = points_of_rounds(arguments.checkpoints)
    if arguments.dry_run:
        dry_run(points, paths, output)
        return
    handed_on = {name: value for name in HANDED_ON if (value := getattr(arguments, name)) is not None}
    flags = [part for name, value in handed_on.items() for part in (f"--{name}", value)]
    flags += ["--data_path", ",".join(map(str, paths))]
    identity = {
        "run": trained, "training_started": training["started"] if training else None, "data": list(map(str, paths)),
        "max_new_tokens": arguments.max_new_tokens, "judge": arguments.judge,
    }  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the evaluation along
    with open_run(output, "sweep", identity, paths) as run:
        run.save("running")
        before = sum(evaluation_of(output / point.name) is not None for point in points)
        points = [point for point in points if evaluate(point, training, output, flags)]
        if not points:
            raise UserError(f"no checkpoint of {trained} can be evaluated; the reasons are above. Fix: see there")
        table = table_of(points, output)
        print(write_table(table, points, output), end="")
        plot(table, points, output / "sweep.png", rounds=training is None)
        counts = {"checkpoints": len(points), "newly_evaluated": len(points) - before, "benchmarks": len(table.rows)}
        run.finish(output / "sweep.md", **counts)


if __name__ == "__main__":
    run_command(main)
