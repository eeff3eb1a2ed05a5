"""LLaVA-CoT's tagged answers as reasoning records and short answers."""

import json
import sys
from pathlib import Path

import pytest

from llava.prompts import COT_HEADINGS, FormatError
from llava.records import check_placeholders, check_trainable, read_jsonl, read_records
from training_data_annotation import convert_reasoning
from training_data_annotation.convert_reasoning import convert


def tagged(answer: str) -> str:
    return (
        f"<SUMMARY> Find {answer}. </SUMMARY>\n\n<CAPTION> A chart. </CAPTION>\n\n"
        f"<REASONING> The bar says {answer}. </REASONING>\n\n<CONCLUSION> {answer} </CONCLUSION>"
    )


def stepped(answer: str) -> str:
    return (
        f"Step 1: Clarify the task objective.\nFind {answer}.\n\n"
        "Step 2: Extract the crucial visual information from the image.\nA chart.\n\n"
        f"Step 3: Generate detailed reasoning to solve the task.\nThe bar says {answer}.\n\n"
        f"Step 4: Conclude the task with an answer.\n{answer}"
    )


def record(*texts: str, **fields) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "r1", "image": "chart.png", "conversations": turns, **fields}


def values(converted: dict) -> list[str]:
    return [turn["value"] for turn in converted["conversations"]]


def test_one_turn_gives_steps_and_a_short_answer():
    source = record("How many? Answer the question using a single word or phrase.", tagged("21"))
    before = json.dumps(source)
    cot, short = convert(source)
    assert values(cot) == ["<image>\nHow many? Answer the question step-by-step.", stepped("21")]
    assert values(short) == ["<image>\nHow many? Answer the question using a single word or phrase.", "21"]
    assert (cot["id"], short["id"]) == ("r1-cot", "r1-short")
    assert cot["image"] == short["image"] == "chart.png"
    assert cot["lineage"] == short["lineage"] == {"stage": "convert", "source": "r1"}
    assert json.dumps(source) == before


def test_a_question_without_the_short_instruction_gets_one_appended():
    cot, short = convert(record("How many?", tagged("21")))
    assert values(cot)[0] == "<image>\nHow many? Answer the question step-by-step."
    assert values(short)[0] == "<image>\nHow many?"


def test_every_turn_is_converted_and_only_the_first_shows_the_image():
    cot, short = convert(record("How many?", tagged("21"), "In which year?", tagged("2017")))
    assert values(cot) == [
        "<image>\nHow many? Answer the question step-by-step.",
        stepped("21"),
        "In which year? Answer the question step-by-step.",
        stepped("2017"),
    ]
    assert values(short) == ["<image>\nHow many?", "21", "In which year?", "2017"]


def test_a_placeholder_that_is_there_is_not_doubled():
    for question in ("<image>\nHow many?", "How many?\n<image>"):
        cot, short = convert(record(question, tagged("21")))
        assert values(cot)[0].count("<image>") == values(short)[0].count("<image>") == 1
        check_placeholders(cot, "cot")


def test_several_images_and_none():
    cot, _ = convert(record("Compare.", tagged("same"), image=["a.png", "b.png"]))
    assert values(cot)[0] == "<image>\n<image>\nCompare. Answer the question step-by-step."
    cot, _ = convert(record("2 + 2?", tagged("4"), image=None))
    assert values(cot)[0] == "2 + 2? Answer the question step-by-step."


@pytest.mark.parametrize("tag", ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"])
def test_a_missing_tag_in_any_turn_rejects_the_record(tag):
    damaged = tagged("2017").replace(f"<{tag}>", "")
    with pytest.raises(FormatError, match=f"<{tag}>"):
        convert(record("How many?", damaged))
    with pytest.raises(FormatError, match=f"<{tag}>"):
        convert(record("How many?", tagged("21"), "In which year?", damaged))


@pytest.mark.parametrize("texts", [("How many?",), ("How many?", tagged("21"), "And then?")])
def test_a_question_without_an_answer_rejects_the_record(texts):
    with pytest.raises(FormatError):
        convert(record(*texts))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on records; returns its output folder."""

    def call(records: list[dict], *more: str) -> Path:
        source = tmp_path / "train.jsonl"
        source.write_text("".join(json.dumps(item) + "\n" for item in records))
        output = tmp_path / "out"
        command = ["convert", "--data_path", source, "--output_cot_dir", output / "cot"]
        command += ["--output_short_dir", output / "short", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        convert_reasoning.main()
        return output

    return call


def test_the_command_writes_both_files_and_the_rejected_rows(run, capsys):
    good, bad = record("How many?", tagged("21")), record("How many?", "21", id="r2")
    output = run([good, bad])
    [cot] = read_records(output / "cot" / "cot.jsonl")
    [short] = read_records(output / "short" / "short.jsonl")
    assert (values(cot)[1], values(short)[1]) == (stepped("21"), "21")
    assert list(read_jsonl(output / "cot" / "cot.rejected.jsonl")) == [
        {"id": "r2", "reason": "<SUMMARY>...</SUMMARY> is missing or not closed"}
    ]
    assert json.loads((output / "cot" / "run.json").read_text())["counts"] == {"in": 2, "out": 1, "rejected": 1}
    run([good, bad])
    assert "already complete" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(run, tmp_path, capsys):
    run([record("How many?", tagged("21")), record("x", "y", id="r2")], "--dry_run")
    assert "2: 1 convertible, 1 not" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_published_records_become_trainable_with_a_placeholder(run, real_data):
    samples = real_data / "schema_samples" / "llava_cot_samples.json"
    if not samples.is_file():
        pytest.skip(f"{samples} is absent; set SICOG_DATA to the data folder")
    output = run(json.loads(samples.read_text())["records"])
    for name in ("cot/cot.jsonl", "short/short.jsonl"):
        records = list(read_records(output / name))
        assert len(records) == 2
        for item in records:
            check_placeholders(item, name)
            check_trainable(item, name)
            assert values(item)[0].startswith("<image>\n")
    chart, demo = read_records(output / "cot" / "cot.jsonl")
    assert values(chart)[0].endswith("in the previous year? Answer the question step-by-step.")
    assert all(values(item)[1].count(heading) == 1 for item in (chart, demo) for heading in COT_HEADINGS)
    assert [values(item)[1] for item in read_records(output / "short" / "short.jsonl")] == ["21", "B"]
