"""The evaluation command: a checkpoint or a server is asked, answers are scored, everything is found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest

from llava.eval.benchmarks import score
from llava.eval.judge import Judge, filled, read_verdict
from llava.eval.questions import read_tsv
from llava.eval.scoring import rule_for
from llava.records import read_jsonl
from tests.loopback import Loopback, completion


def evaluate(*arguments, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava.eval.benchmarks", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def finished(checkpoint, world, tmp_path_factory) -> Path:
    """An evaluation of the fresh checkpoint on two toy benchmarks."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    data = f"{world}/benchmarks/ToyMCQ.tsv,{world}/benchmarks/ToyVQA.tsv"
    done = evaluate(
        "--model_name_or_path", checkpoint, "--data_path", data, "--output_dir", folder, "--max_new_tokens", 6
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_results_predictions_and_sheets_say_the_same(finished, world, checkpoint):
    results = json.loads((finished / "results.json").read_text())["benchmarks"]
    assert list(results) == ["ToyMCQ", "ToyVQA"]
    for name, found in results.items():
        rows, lines = (
            read_tsv(world / "benchmarks" / f"{name}.tsv"),
            list(read_jsonl(finished / "predictions" / f"{name}.jsonl")),
        )
        assert [line["index"] for line in lines] == [row["index"] for row in rows]
        assert found["value"] == pytest.approx(100 * sum(line["score"] for line in lines) / len(lines))
        assert found["low"] <= found["value"] <= found["high"]
        sheet = openpyxl.load_workbook(finished / "vlmevalkit" / "init" / f"init_{name}.xlsx").active
        header, *cells = sheet.iter_rows(values_only=True)
        assert (header[-1], "image" in header) == ("prediction", False)
        assert [line[0] for line in cells] == [int(row["index"]) for row in rows]
        assert [line[-1] or "" for line in cells] == [line["prediction"] for line in lines]


def test_again_it_is_complete_and_ranks_give_the_same(finished, checkpoint, world, tmp_path):
    data = f"{world}/benchmarks/ToyMCQ.tsv,{world}/benchmarks/ToyVQA.tsv"
    common = ["--model_name_or_path", checkpoint, "--data_path", data, "--max_new_tokens", 6]
    assert "already complete" in evaluate(*common, "--output_dir", finished).stdout
    command = [sys.executable, "-m", "llava.eval.benchmarks", *map(str, common), "--output_dir", str(tmp_path / "two")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": rank, "WORLD_SIZE": "2"})
        for rank in "01"
    ]
    assert [process.wait(240) for process in ranks] == [0, 0]
    assert len(list((tmp_path / "two" / "answers" / "ToyVQA").glob("shard-*.jsonl"))) == 2
    for name in ("ToyMCQ", "ToyVQA"):
        path = Path("predictions") / f"{name}.jsonl"
        assert (tmp_path / "two" / path).read_text() == (finished / path).read_text()


def test_what_a_killed_run_answered_is_not_asked_again(world, tmp_path):
    """A server that goes away after two answers; then one that comes back."""
    data, folder = world / "benchmarks" / "ToyVQA.tsv", tmp_path / "out"

    def once(number: int, _: dict):
        return (200, completion([f"answer {number}"]), {}) if number < 2 else (401, {"error": {"message": "gone"}}, {})

    def run(server) -> subprocess.CompletedProcess:
        arguments = ["--base_url", server.base_url, "--model", "toy", "--batch_size", 1]
        return evaluate(*arguments, "--data_path", data, "--output_dir", folder)

    with Loopback(once) as server:
        port = server.base_url
        failed = run(server)
        assert failed.returncode == 2
        assert "the server refused us" in failed.stderr
    kept = list(read_jsonl(folder / "answers" / "ToyVQA" / "shard-00000.jsonl"))
    assert [line["prediction"] for line in kept] == ["answer 0", "answer 1"]
    state = json.loads((folder / "run.json").read_text())
    with Loopback(lambda *_: (200, completion(["red"]), {})) as server:
        state["arguments"]["model"] = state["arguments"]["model"].replace(port, server.base_url)  # another port here
        (folder / "run.json").write_text(json.dumps(state))
        done = run(server)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 2
        content = server.requests[0]["messages"][0]["content"]
        assert [part["type"] for part in content] == ["image_url", "text"]
        assert server.requests[0]["temperature"] == 0
    again = evaluate(
        "--base_url", "http://127.0.0.1:9/v1", "--model", "toy", "--data_path", data, "--output_dir", folder
    )
    assert "belongs to another run" in again.stderr
    lines = list(read_jsonl(folder / "predictions" / "ToyVQA.jsonl"))
    assert [line["prediction"] for line in lines] == ["answer 0", "answer 1", "red", "red"]


def test_what_a_server_refuses_is_counted_and_a_judge_may_come_later(world, tmp_path):
    """ToyMCQ: one answer in words, one refused, two letters; then a judge reads what rules could not."""
    data, folder = world / "benchmarks" / "ToyMCQ.tsv", tmp_path / "out"

    def answer(number: int, body: dict):
        if body["model"] == "judge":
            return 200, completion(["A"]), {}
        return (
            (400, {"error": {"message": "no"}}, {})
            if number == 1
            else (200, completion(["?" if number < 2 else "=B"]), {})
        )

    with Loopback(answer) as server:
        common = ["--base_url", server.base_url, "--model", "toy", "--batch_size", 1, "--data_path", data]
        done = evaluate(*common, "--output_dir", folder)
        assert done.returncode == 0, done.stderr
        assert "1 refused" in done.stdout
        assert json.loads((folder / "results.json").read_text())["benchmarks"]["ToyMCQ"]["refused"] == 1
        assert len(server.requests) == 4
        judged = evaluate(*common, "--output_dir", folder, "--judge", "judge", "--judge_base_url", server.base_url)
        assert judged.returncode == 0, judged.stderr
        assert [request["model"] for request in server.requests[4:]] == ["judge"] * (len(server.requests) - 4)
        found = json.loads((folder / "results.json").read_text())
        assert found["judge"] == "judge"
        assert found["benchmarks"]["ToyMCQ"]["judge"]["asked"] == len(server.requests) - 4 >= 2
    sheet = openpyxl.load_workbook(folder / "vlmevalkit" / "toy" / "toy_ToyMCQ.xlsx").active
    assert [row[-1].data_type for row in sheet.iter_rows(min_row=4)] == ["s", "s"]  # "=B" is no formula


def test_a_model_is_needed_and_only_one(world, tmp_path):
    common = ["--data_path", world / "benchmarks", "--output_dir", tmp_path / "out"]
    assert "MODEL_PATH=checkpoint" in evaluate(*common).stderr
    assert "needs --model" in evaluate(*common, "--base_url", "http://127.0.0.1:1/v1").stderr
    assert not (tmp_path / "out").exists()


# A judge


def choice(number: int, answer: str) -> dict[str, str]:
    return {"index": str(number), "question": "What is it?", "A": "cat", "B": "dog", "answer": answer, "category": "x"}


def test_a_judge_is_asked_only_what_rules_cannot_read_and_only_once(tmp_path):
    rows = [choice(0, "B"), choice(1, "B"), choice(2, "A")]
    answers = {"0": "B", "1": "some barking thing", "2": "no idea"}

    def verdict(_, body):
        return 200, completion(["B" if "barking" in body["messages"][0]["content"] else "Z"]), {}

    with Loopback(verdict) as server:
        judge = Judge("judge-1", server.base_url, tmp_path)
        alone = score("MMStar", rows, answers, None)[1]
        assert (alone["value"], "judge" in alone) == (pytest.approx(100 / 3), False)
        predictions, judged = score("MMStar", rows, answers, judge)
        assert judged["value"] == pytest.approx(200 / 3)
        assert [line["extracted"] for line in predictions] == ["B", "B", "Z"]
        assert (judged["judge"]["model"], judged["judge"]["asked"], judged["judge"]["not_understood"]) == ("toy", 2, 0)
        assert len(server.requests) == 2
        assert score("MMStar", rows, answers, judge)[1] == judged
        assert len(server.requests) == 2  # kept


def test_a_judge_that_talks_is_asked_three_times_and_then_marks_nothing(tmp_path):
    with Loopback(lambda *_: (200, completion(["It depends."]), {})) as server:
        judge = Judge("judge-1", server.base_url, tmp_path)
        _, found = score("MMStar", [choice(0, "B")], {"0": "woof"}, judge)
        assert (found["value"], found["judge"]["not_understood"]) == (0, 1)
        assert [request["temperature"] for request in server.requests] == [0, 0.5, 1]


def test_grades_of_mmvet_come_from_the_judge_alone(tmp_path):
    row = {"index": "1", "question": "x?", "answer": "-1<AND>-5", "category": "math"}
    rule = rule_for("MMVet", [row])
    assert read_verdict("grade", rule, row, " 0.5.") == (" 0.5.", 0.5)
    assert [read_verdict("grade", rule, row, text)[1] for text in ("1.0", "0", "1.5", "half", "-0.1")] == [
        1,
        0,
        None,
        None,
        None,
    ]
    assert "Right answer: -1<AND>-5\nAnswer: {x}\n" in filled("Right answer: {right}\nAnswer: {answer}\n", row, "{x}")
    with Loopback(lambda *_: (200, completion(["0.7"]), {})) as server:
        _, found = score("MMVet", [row], {"1": "-1 and -5"}, Judge("j", server.base_url, tmp_path))
        assert found["value"] == 70
    assert score("MMVet", [row], {"1": "-1 and -5"}, None)[1] | {"details": {}, "low": 0, "high": 0} == {
        "questions": 1, "metric": "accuracy", "value": 100.0, "low": 0, "high": 0, "total": "mean",
        "scored_by": "parts found, no judge", "details": {},
    }  # fmt: skip
