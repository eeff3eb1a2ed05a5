"""The results table, from result folders written by hand."""

import json
import sys
from pathlib import Path

import openpyxl
import pytest

from llava.errors import UserError
from llava.eval import report
from llava.eval.benchmarks import summary
from llava.eval.report import paired_difference, table


def write_results(folder: Path, benchmarks: dict[str, str], indices: str = "") -> Path:
    """A results folder; a benchmark is a string of 1 (correct) and 0, one for each question."""
    results = {}
    (folder / "predictions").mkdir(parents=True)
    for name, outcomes in benchmarks.items():
        rows = [
            {"index": index, "correct": outcome == "1"}
            for index, outcome in zip(indices or map(str, range(len(outcomes))), outcomes, strict=True)
        ]
        results[name] = summary(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "predictions" / f"{name}.jsonl").write_text(lines)
    (folder / "results.json").write_text(json.dumps({"model": str(folder), "benchmarks": results}))
    return folder


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    return {
        "base": write_results(tmp_path / "one", {"MCQ": "1100000000", "POPE": "1111"}),
        "SICOG": write_results(tmp_path / "two", {"MCQ": "1011100000", "POPE": "1111"}),
    }


def test_the_paired_difference_by_hand(models):
    first, second = (folder / "predictions" / "MCQ.jsonl" for folder in models.values())
    # differences: 0, -1, +1, +1, +1 and five 0: mean (3 - 1) / 10 = 0.2
    # squares about the mean: 3 * 0.8^2 + 1.2^2 + 6 * 0.2^2 = 3.6; variance 3.6 / 9 = 0.4; error sqrt(0.04) = 0.2
    assert paired_difference(first, second) == pytest.approx((0.2, 1.959964 * 0.2))
    assert paired_difference(second, first) == pytest.approx((-0.2, 1.959964 * 0.2))
    assert paired_difference(first, first) == (0, 0)


def test_questions_are_paired_by_index_not_by_position(tmp_path):
    one = write_results(tmp_path / "one", {"MCQ": "110"}, indices="abc")
    two = write_results(tmp_path / "two", {"MCQ": "011"}, indices="cba")
    assert paired_difference(one / "predictions" / "MCQ.jsonl", two / "predictions" / "MCQ.jsonl") == (0, 0)


def test_the_table_shows_counts_intervals_differences_and_averages(models):
    header, mcq, pope, average = table(models)
    assert header == ["benchmark", "n", "base (95% interval)", "SICOG (95% interval)", "SICOG - base"]
    # Wilson: 2 of 10 and 4 of 10; 4 of 4
    assert mcq == ["MCQ", "10", "20.0% (5.7% to 51.0%)", "40.0% (16.8% to 68.7%)", "+20.0 ± 39.2"]
    assert pope == ["POPE", "4", "100.0% (51.0% to 100.0%)", "100.0% (51.0% to 100.0%)", "+0.0 ± 0.0"]
    assert average == ["average", "", "60.0%", "70.0%", "+10.0"]


def test_one_model_alone_has_no_difference(models):
    header, mcq, _, average = table({"base": models["base"]})
    assert (len(header), len(mcq)) == (3, 3)
    assert average == ["average", "", "60.0%"]


def test_the_difference_is_between_the_first_and_the_last_of_three(models, tmp_path):
    models["last"] = write_results(tmp_path / "three", {"MCQ": "0000000000", "POPE": "1111"})
    header, mcq, _, average = table(models)
    assert header[-1] == "last - base"
    assert mcq[-1].startswith("-20.0 ± ")
    assert average[-1] == "-10.0"


def test_other_benchmarks_and_other_questions_are_refused(models, tmp_path):
    other = write_results(tmp_path / "three", {"MCQ": "1100000000"})
    with pytest.raises(UserError, match="three was evaluated on MCQ, not MCQ, POPE"):
        table({**models, "three": other})
    shifted = write_results(tmp_path / "four", {"MCQ": "1100000000", "POPE": "1111"})
    path = shifted / "predictions" / "POPE.jsonl"
    path.write_text(path.read_text().replace('"index": "3"', '"index": "9"'))
    with pytest.raises(UserError, match="answer different questions; evaluate both on the same TSV"):
        table({"base": models["base"], "four": shifted})


def test_missing_predictions_are_an_error_not_an_empty_comparison(models):
    for folder in models.values():
        (folder / "predictions" / "POPE.jsonl").unlink()
    with pytest.raises(UserError, match="POPE"):
        table(models)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        table({"base": tmp_path})


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*results: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["report", "--results", *results, "--output", str(tmp_path / "new" / "table")])
        report.main()
        return tmp_path / "new" / "table"

    return call


def test_the_spreadsheet_equals_the_markdown_and_the_printed_table(run, models, capsys):
    output = run(*(f"{name}={folder}" for name, folder in models.items()))
    text = Path(f"{output}.md").read_text()
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]
    assert cells == table(models)
    assert len({len(line) for line in lines}) == 1
    assert capsys.readouterr().out == text
    sheet = openpyxl.load_workbook(f"{output}.xlsx").active
    assert [[cell or "" for cell in row] for row in sheet.iter_rows(values_only=True)] == cells
    assert all(cell.font.bold for cell in sheet[1])


def test_results_without_a_name_are_refused(run, models):
    with pytest.raises(UserError, match="wants NAME=FOLDER, not "):
        run(str(models["base"]))
