"""The results table: from folders of ours, of VLMEvalKit and of lmms-eval, all written by hand."""

import csv
import json
import sys
from pathlib import Path

import openpyxl
import pytest

from llava.errors import UserError
from llava.eval import report
from llava.eval.benchmarks import score, write_sheet
from llava.eval.published import ORDER, PUBLISHED
from llava.eval.report import build, cells, family, latex
from llava.eval.results import read_results


def rows_of(outcomes: str) -> tuple[list[dict], dict[str, str]]:
    """Questions and answers; 1 is answered rightly, 0 wrongly."""
    rows = [
        {"index": str(number), "question": "q", "A": "cat", "B": "dog", "answer": "A", "category": "x"}
        for number in range(len(outcomes))
    ]
    return rows, {str(number): "A" if outcome == "1" else "B" for number, outcome in enumerate(outcomes)}


def write_results(folder: Path, benchmarks: dict[str, str]) -> Path:
    results = {}
    (folder / "predictions").mkdir(parents=True)
    for name, outcomes in benchmarks.items():
        predictions, results[name] = score(name, *rows_of(outcomes), None)
        (folder / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    (folder / "results.json").write_text(json.dumps({"model": str(folder), "benchmarks": results}))
    return folder


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    return {
        "base": write_results(tmp_path / "one", {"MMStar": "1100000000", "Own": "1111"}),
        "SICOG": write_results(tmp_path / "two", {"MMStar": "1011100000", "Own": "1111"}),
    }


def test_the_table_shows_counts_intervals_differences_and_averages(models):
    header, star, own, average = cells(build(models, []))
    assert header == ["benchmark", "n", "base", "SICOG", "SICOG - base", "p"]
    # Wilson: 2 of 10 and 4 of 10; 4 of 4. One question lost, three won: 10 of 16 exchanges are as far apart
    assert star[:4] == ["MMStar", "10", "20.0 (5.7 to 51.0)", "**40.0 (16.8 to 68.7)**"]
    assert star[4].startswith("+20.0 (")
    assert float(star[5]) == pytest.approx(10 / 16, abs=0.02)
    assert own == ["Own", "4", "**100.0 (51.0 to 100.0)**", "**100.0 (51.0 to 100.0)**", "+0.0 (+0.0 to +0.0)", "1.000"]
    assert average == ["average", "of 2", "60.0", "70.0", "+10.0", ""]


def test_one_model_alone_has_no_difference_and_no_best(models):
    header, star, _, average = cells(build({"base": models["base"]}, []))
    assert (len(header), star[2], average) == (3, "20.0 (5.7 to 51.0)", ["average", "of 2", "60.0"])


def test_every_further_model_is_compared_with_the_first(models, tmp_path):
    models["last"] = write_results(tmp_path / "three", {"MMStar": "0000000000"})
    header, star, own, average = cells(build(models, []))
    assert header[5:] == ["SICOG - base", "p", "last - base", "p"]
    assert star[7].startswith("-20.0 (")
    assert (own[4], own[7:]) == ("", ["", ""])
    assert average == ["average", "of 1", "20.0", "40.0", "0.0", "+20.0", "", "-20.0", ""]


def test_questions_are_paired_by_index_not_by_position(models, tmp_path):
    path = models["SICOG"] / "predictions" / "MMStar.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    star = cells(build(models, []))[1]
    assert float(star[5]) == pytest.approx(10 / 16, abs=0.02)


def test_other_questions_are_refused(models):
    path = models["SICOG"] / "predictions" / "Own.jsonl"
    path.write_text(path.read_text().replace('"index": "3"', '"index": "9"'))
    with pytest.raises(UserError, match="Own: the models answered different questions"):
        build(models, [])


def test_missing_predictions_and_folders_without_results_are_errors(models, tmp_path):
    (models["base"] / "predictions" / "Own.jsonl").unlink()
    with pytest.raises(UserError, match=r"Own\.jsonl holds no predictions"):
        build(models, [])
    with pytest.raises(UserError, match="nowhere holds no results"):
        build({"base": tmp_path / "nowhere"}, [])


def test_the_published_numbers_are_columns_of_their_own_and_blank_where_unknown(models):
    table = build({"base": models["base"]}, ["base", "SICOG"])
    assert table.rows == [*ORDER, "Own"]
    text = dict(zip(table.rows, cells(table)[1:-1], strict=True))
    assert text["MMStar"] == ["MMStar", "10", "20.0 (5.7 to 51.0)", "48.9", "**52.5**"]
    assert text["MME"] == ["MME", "", "", "1554.8", "**1596.6**"]
    assert text["Own"][3:] == ["", ""]
    assert cells(table)[-1] == ["average", "of 2", "60.0", "", ""]
    assert table.sources["SICOG (paper)"] == "arXiv 2503.12303, printed, SIcog-LLaVA-Qwen2-7B-UHD"


def test_the_published_differences_are_those_of_the_paper():
    base, sicog = PUBLISHED["base"][1], PUBLISHED["SICOG"][1]
    changes = {name: round(sicog[name] - base[name], 1) for name in ORDER}
    assert changes == {
        "MME": 41.8, "MMBench": 0.5, "MMStar": 3.6, "MMVet": 2.3, "POPE": 0.5, "RealWorldQA": 1.7, "ScienceQA": 2.1,
        "AI2D": 3.5, "MathVista": 2.5, "ChartQA": 3.1, "DocVQA": 3.5, "OCRBench": 2.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "short"),
    [("MMBench_DEV_EN", "MMBench"), ("mmbench_en_dev", "MMBench"), ("SEEDBench_IMG", "SEED"), ("MME", "MME"),
     ("MathVista_MINI", "MathVista"), ("scienceqa_img", "ScienceQA"), ("ToyVQA", "ToyVQA"),
     ("MME-RealWorld", "MME-RealWorld"), ("OCRBench_v2", "OCRBench_v2"), ("ChartQAPro", "ChartQAPro"),
     ("MMBench_DEV_CN", "MMBench_DEV_CN"), ("MMBench_DEV_EN_V11", "MMBench"), ("MMVet_Hard", "MMVet_Hard")],
)  # fmt: skip
def test_the_name_of_a_benchmark_in_papers(name, short):
    assert family(name) == short


def vlmevalkit_folder(folder: Path) -> Path:
    """What VLMEvalKit leaves for a model, file by file."""
    folder = folder / "my-model"
    folder.mkdir()

    def sheet(name: str, *lines: list) -> None:
        with (folder / f"my-model_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)

    sheet("MMStar_acc", ["split", "Overall", "x"], ["none", 0.2, 0.2])
    write_sheet(folder / "my-model_MMStar.xlsx", *rows_of("1100000000"))
    sheet("POPE_score", ["split", "Overall", "acc", "precision", "recall"], ["Overall", 86.0, 87.0, 90.0, 82.0])
    sheet("MME_score", ["perception", "reasoning", "OCR"], [1500.5, 300.0, 120.0])
    sheet("ChartQA_TEST_acc", ["Overall", "human"], [70.5, 60.0])
    sheet("MMVet_gpt-4o_score", ["Category", "tot", "acc"], ["rec", 10, 30.0], ["Overall", 20, 38.5])
    write_sheet(folder / "my-model_MMVet.xlsx", *rows_of("10"))
    (folder / "my-model_OCRBench_score.json").write_text('{"Final Score": 552, "Final Score Norm": 55.2}')
    return folder


def test_vlmevalkits_folder_is_read_and_gets_intervals_where_its_number_is_found_again(tmp_path, models):
    found = read_results(vlmevalkit_folder(tmp_path))
    assert {name: entry.value for name, entry in found.items()} == {
        "MMStar": 20.0, "POPE": 86.0, "MME": 1500.5, "ChartQA_TEST": 70.5, "MMVet": 38.5, "OCRBench": 55.2,
    }  # fmt: skip
    assert found["MMVet"].source == "VLMEvalKit, judge gpt-4o"
    assert (found["MMVet"].low, found["POPE"].low) == (None, None)
    assert (round(found["MMStar"].low, 1), round(found["MMStar"].high, 1), found["MMStar"].questions) == (5.7, 51.0, 10)
    table = build({"VLMEvalKit": tmp_path / "my-model", "SICOG": models["SICOG"]}, [])
    assert table.differences["MMStar", "SICOG"].p is not None


def test_benchmarks_whose_names_begin_alike_and_several_models_are_told_apart(tmp_path):
    for model in ("base", "sicog"):
        folder = tmp_path / model
        folder.mkdir()
        for name, share in (("AI2D_TEST", 0.5), ("AI2D_TEST_NO_MASK", 0.25)):
            write_sheet(folder / f"{model}_{name}.xlsx", *rows_of("10"))
            (folder / f"{model}_{name}_acc.csv").write_text(f"split,Overall\nnone,{share}\n")
        (folder / f"{model}_ChartQA_TEST_results.json").write_text("[]")  # VLMEvalKit's too, with PRED_FORMAT=json
    found = read_results(tmp_path / "base")
    assert {name: entry.value for name, entry in found.items()} == {"AI2D_TEST": 50, "AI2D_TEST_NO_MASK": 25}
    assert found["AI2D_TEST"].low is not None
    assert found["AI2D_TEST_NO_MASK"].low is None  # our marks give 50 there
    with pytest.raises(UserError, match="several models: base, sicog"):
        read_results(tmp_path)


def test_lmms_evals_folder_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    results = {
        "mmstar": {"alias": "mmstar", "math,none": 0.7, "average,none": 0.525, "average_stderr,none": 0.01},
        "mme": {"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1590.2, "mme_perception_score_stderr,none": "N/A"},
        "pope": {"pope_accuracy,none": 0.88, "pope_f1_score,none": 0.87, "pope_f1_score_stderr,none": "N/A"},
        "group": {"alias": "group"},
    }  # fmt: skip
    old, new = tmp_path / "model" / "20260101_000000_results.json", tmp_path / "model" / "20261101_000000_results.json"
    old.write_text('{"results": {"mmstar": {"average,none": 0.1}, "own": {"cider,none": 1.07, "bleu,none": 0.2}}}')
    new.write_text(json.dumps({"results": results, "n-samples": {"mmstar": {"original": 1500, "effective": 1500}}}))
    found = read_results(tmp_path)
    assert {name: (entry.value, entry.metric) for name, entry in found.items()} == {
        "mmstar": (52.5, "average"), "own: cider": (1.07, "cider"), "own: bleu": (0.2, "bleu"), "mme": (1590.2, "mme_perception_score"), "pope": (87.0, "pope_f1_score"),
    }  # fmt: skip
    assert (found["mmstar"].questions, found["mmstar"].low) == (1500, pytest.approx(52.5 - 1.959964))
    text = cells(build({"m": tmp_path}, ["base"]))
    assert [line[0] for line in text[1:4]] == ["mme", "MMBench", "mmstar"]
    assert text[3][3] == "48.9"


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*arguments: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["report", *arguments, "--output", str(tmp_path / "new" / "table")])
        report.main()
        return tmp_path / "new" / "table"

    return call


def test_the_three_files_say_what_is_printed(run, models, capsys):
    output = run("--results", *(f"{name}={folder}" for name, folder in models.items()))
    printed = capsys.readouterr().out
    text = Path(f"{output}.md").read_text()
    assert text.startswith(printed)
    assert "* MMStar, Own: accuracy; exact match" in text
    lines = printed.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert Path(f"{output}.tex").read_text() == latex(build(models, []))
    book = openpyxl.load_workbook(f"{output}.xlsx")
    assert book.sheetnames == ["table", "details", "sources"]
    header, star, _own, average = book["table"].iter_rows(values_only=True)
    assert header == (
        "benchmark",
        "n",
        "base",
        "low",
        "high",
        "SICOG",
        "low",
        "high",
        "SICOG - base",
        "low",
        "high",
        "p",
    )
    assert (star[:3], star[5], star[8]) == (("MMStar", 10, 20.0), 40.0, 20.0)
    assert (average[2], average[5], average[8]) == (60.0, 70.0, 10.0)
    assert [cell.font.bold for cell in book["table"][2]].count(True) == 1
    assert list(book["details"].iter_rows(values_only=True))[1] == ("MMStar", "x", 20.0, 40.0)


def test_latex_escapes_names_and_marks_the_best(models):
    text = latex(build({"base_1": models["base"], "R&D": models["SICOG"]}, []))
    assert r"benchmark & base\_1 & R\&D \\" in text
    assert r"MMStar & 20.0 & \textbf{40.0}\,{\scriptsize (+20.0)} \\" in text
    assert text.count("{") == text.count("}")


def test_bad_arguments_are_refused(run, models):
    with pytest.raises(UserError, match="wants NAME=FOLDER, not "):
        run("--results", str(models["base"]))
    with pytest.raises(UserError, match="names 'a' twice"):
        run("--results", f"a={models['base']}", f"a={models['SICOG']}")
    with pytest.raises(UserError, match="'gold' is not known"):
        run("--results", f"a={models['base']}", "--published", "gold")
