"""Preference pairs from annotated records and corrupted images, from curation, and from other projects' triples."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import UserError
from llava.pairs import check_pair, read_pairs
from llava.records import RecordError, read_jsonl, write_records
from quality_evaluation import curate, pairs
from quality_evaluation.triples import triple_of


def annotated(identifier: str, answer: str = "A bus.", **fields) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]
    lineage = {"stage": "annotate", "source": f"raw-{identifier}", "model": "gpt-4o"}
    return {"id": identifier, "image": "a.png", "conversations": turns, "lineage": lineage, **fields}


def candidate(text: str, sample: int = 0, corruption: str | None = "mask", **fields) -> dict:
    return {
        "text": text, "finish_reason": "stop", "sample": sample, "seed": 100 + sample, "style": "cot-default",
        "instruction": "What is this?", "model": "runs/reasoning", "model_hash": "cafe", "corruption": corruption, **fields,
    }  # fmt: skip


def answered(identifier: str, *candidates: dict, **fields) -> dict:
    return {**annotated(identifier), "candidates": list(candidates), **fields}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command in a folder with an image: (pairs, rejected rows, what it printed)."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")

    def call(*arguments, output: str = "out") -> tuple[list[dict], list[dict], str]:
        command = ["pairs", *arguments, "--output_dir", output]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        capsys.readouterr()
        pairs.main()
        folder = tmp_path / output
        rows = [list(read_jsonl(folder / f"{name}.jsonl")) for name in ("pairs", "pairs.rejected")]
        return *rows, capsys.readouterr().out

    return call


@pytest.fixture
def corrupted(run):
    """Pairs of these annotated records and these candidates."""

    def call(records: list[dict], answers: list[dict], *more, output: str = "out"):
        write_records(f"{output}-good.jsonl", records)
        write_records(f"{output}-noisy.jsonl", answers)
        return run("--annotated", f"{output}-good.jsonl", "--corrupted", f"{output}-noisy.jsonl", *more, output=output)

    return call


def test_annotated_answers_against_answers_to_corrupted_images(corrupted):
    made, rejected, printed = corrupted([annotated("1")], [answered("1", candidate("A boat on a lake."))])
    assert made == [
        {
            "id": "1-corrupted", "image": "a.png", "prompt": "<image>\nWhat is this?", "chosen": "A bus.",
            "rejected": "A boat on a lake.", "source": "corrupted",
            "lineage": {
                "stage": "pairs", "source": "1", "file": "out-good.jsonl",
                "chosen": {"origin": "annotation", "stage": "annotate", "source": "raw-1", "model": "gpt-4o"},
                "rejected": {
                    "origin": "candidate", "record": "1", "finish_reason": "stop", "sample": 0, "seed": 100,
                    "style": "cot-default", "instruction": "What is this?", "model": "runs/reasoning",
                    "model_hash": "cafe", "corruption": "mask", "file": "out-noisy.jsonl",
                },
            },
        }
    ]  # fmt: skip
    assert rejected == []
    assert "corrupted    1 records, 1 pairs" in printed
    assert "words        chosen 2.0, rejected 5.0 on average; chosen is longer in 0.0% of the pairs" in printed
    assert "careful" not in printed
    assert list(read_pairs("out/pairs.jsonl")) == made


def test_candidates_of_the_source_record_match_too(corrupted):
    made, _, _ = corrupted([annotated("1-cod", lineage={"source": "1"})], [answered("1", candidate("A boat."))])
    assert [row["lineage"]["source"] for row in made] == ["1-cod"]
    assert made[0]["lineage"]["rejected"]["record"] == "1"


@pytest.mark.parametrize(
    ("record", "answers", "reason"),
    [
        (annotated("1"), [answered("2", candidate("A boat."))], "no candidates under its id"),
        (annotated("1"), [answered("1", candidate("A boat.", corruption=None))], "no candidate is of a corrupted image"),
        (annotated("1"), [answered("1", candidate(" "))], "every candidate is empty or cut off"),
        (annotated("1"), [answered("1", candidate("A b", finish_reason="length"))], "every candidate is empty or cut off"),
        (annotated("1"), [answered("1", candidate("A bus. "))], "fields chosen and rejected are equal"),
        (annotated("1", " "), [answered("1", candidate("A boat."))], "field chosen is empty"),
        (annotated("1"), [answered("1", candidate("A boat."), image="b.png")], "candidates show another image"),
        (annotated("1", image="b.png"), [answered("1", candidate("A boat."), image="b.png")], "an image file is missing"),
        (annotated("1", image=None), [answered("1", candidate("A boat."), image=None)], "field prompt has 1 <image> for 0"),
        (annotated("1"), [answered("1", candidate("See <image>"))], "field rejected holds <image>"),
        (annotated("1", conversations=[{"from": "human", "value": "<image>"}]), [answered("1", candidate("A boat."))],
         "does not begin with a question and its answer"),
    ],
)  # fmt: skip
def test_records_without_a_pair_say_why(corrupted, record, answers, reason):
    good = [annotated("good"), record]
    made, rejected, printed = corrupted(good, [answered("good", candidate("A boat.")), *answers])
    assert [row["id"] for row in made] == ["good-corrupted"]
    assert [(row["id"], row["source"], row["file"]) for row in rejected] == [("1", "corrupted", "out-good.jsonl")]
    assert rejected[0]["reason"].startswith(reason)
    assert f"rejected     1: {reason}" in printed


def test_cut_off_answers_only_when_allowed(corrupted):
    both = [candidate("A boat.", finish_reason="length"), candidate("A tram.", 1)]
    chosen = [annotated(str(number)) for number in range(20)]
    answers = [answered(str(number), *both) for number in range(20)]
    assert {row["rejected"] for row in corrupted(chosen, answers)[0]} == {"A tram."}
    made, _, _ = corrupted(chosen, answers, "--allow_cut_off", output="all")
    assert {row["rejected"] for row in made} == {"A boat.", "A tram."}


def test_the_seed_draws_and_more_pairs_keep_the_first(corrupted):
    texts = ["a boat", "a tram", "a cart", "a boat ", "A bus."]  # three differ from each other and from what is chosen
    good = [annotated(str(number)) for number in range(12)]
    noisy = [answered(str(number), *map(candidate, texts, range(5))) for number in range(12)]

    def drawn(output, *more) -> list[tuple[str, str]]:
        return [(row["id"], row["rejected"]) for row in corrupted(good, noisy, *more, output=output)[0]]

    one = drawn("one")
    assert one == drawn("again")
    assert one != drawn("seed", "--seed", 1)
    assert len({text for _, text in one}) == 3
    all_three = drawn("three", "--max_per_record", 9)
    assert len(all_three) == 36
    assert set(one) <= set(all_three)
    assert [name for name, _ in all_three[:3]] == ["0-corrupted", "0-corrupted-2", "0-corrupted-3"]


def test_clean_candidates_are_never_drawn(corrupted):
    mixed = [candidate(f"clean {number}", number, corruption=None) for number in range(9)] + [candidate("noisy")]
    made, _, _ = corrupted([annotated("1")], [answered("1", *mixed)], "--max_per_record", 9)
    assert [row["rejected"] for row in made] == ["noisy"]


def test_answers_to_other_instructions_are_counted(corrupted):
    _, _, printed = corrupted([annotated("1")], [answered("1", candidate("A boat.", instruction="Describe it."))])
    assert "careful      in 1 pairs the rejected answer was given to another instruction" in printed


def test_answers_to_other_instructions_are_left_out_on_request(corrupted):
    answers = [answered("1", candidate("A boat.", instruction="Describe it.")), answered("2", candidate("A tram."))]
    made, refused, _ = corrupted([annotated("1"), annotated("2")], answers, "--same_instruction")
    assert [row["rejected"] for row in made] == ["A tram."]
    assert [row["reason"] for row in refused] == ["the rejected answer was given to another instruction"]


@pytest.fixture
def curation(run, monkeypatch):
    """A curation folder that the command itself wrote: one pair."""
    texts = ("A red bus.", "A red bus.", "Two dogs on a beach.", "A red car.")
    rows = [answered("7", *(candidate(text, number, None) for number, text in enumerate(texts)))]
    write_records("candidates.jsonl", rows)
    command = ["--candidates", "candidates.jsonl", "--kind", "caption", "--threshold", "-1", "--output_dir", "curated"]
    monkeypatch.setattr(sys, "argv", ["curate", *command])
    curate.main()
    return "curated"


@pytest.mark.parametrize("name", ["", "/preference.jsonl"])
def test_a_curation_with_who_wrote_what(run, curation, name):
    made, rejected, printed = run("--curated", curation + name, "--image_folder", ".")
    [given] = read_jsonl("curated/preference.jsonl")
    [row] = made
    assert {key: row[key] for key in ("image", "prompt", "chosen", "rejected")} == {
        key: given[key] for key in ("image", "prompt", "chosen", "rejected")
    }
    assert (row["id"], row["source"], rejected) == ("7-curated", "curated", [])
    for side, score in zip(("chosen", "rejected"), given["scores"], strict=True):
        by = row["lineage"][side]
        assert (by["origin"], by["model_hash"], by["score"]) == ("candidate", "cafe", score)
        assert by["seed"] >= 100
        assert "text" not in by
    assert "curated      1 records, 1 pairs" in printed


def test_a_lone_preference_file_keeps_its_scores(run, curation):
    [given] = read_jsonl("curated/preference.jsonl")
    write_records("alone.jsonl", [given])
    [row], _, _ = run("--curated", "alone.jsonl")
    assert row["lineage"]["chosen"] == {"origin": "candidate", "score": given["scores"][0]}


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


PLAIN = {"prompt": "<image>\nWhich?", "chosen": "A.", "rejected": "B.", "image": "a.png"}
PARTS = [{"type": "image"}, {"type": "text", "text": "Which?"}]


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"question": "Which?", "chosen": "A.", "rejected": "B.", "image": "a.png"},
        {"prompt": [turn("user", "Which?")], "chosen": [turn("assistant", "A.")], "rejected": [turn("assistant", "B.")],
         "images": ["a.png"]},
        {"prompt": [turn("system", "Be brief."), turn("user", PARTS)], "chosen": turn("assistant", "A."),
         "rejected": turn("assistant", [{"type": "text", "text": "B."}]), "image": "a.png"},
        {"chosen": [turn("user", "Which?"), turn("assistant", "A.")],
         "rejected": [turn("user", "Which?"), turn("assistant", "B.")], "image": "a.png"},
        {"prompt": "Which?", "chosen": [turn("user", "Which?"), turn("assistant", "A.")],
         "rejected": [turn("user", "Which?"), turn("assistant", "B.")], "image": "a.png"},
        {"conversations": [{"from": "human", "value": "<image>\nWhich?"}], "chosen": {"from": "gpt", "value": "A."},
         "rejected": {"from": "gpt", "value": "B."}, "image": "a.png"},
    ],
)  # fmt: skip
def test_triples_of_many_shapes_say_the_same(row):
    triple = triple_of(row)
    assert {key: triple[key] for key in ("prompt", "chosen", "rejected")} == {
        "prompt": "<image>\nWhich?", "chosen": "A.", "rejected": "B.",
    }  # fmt: skip
    assert triple["image"] in ("a.png", ["a.png"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "no known speaker"),
        ({"rejected": [turn("user", "B.")]}, "does not end with the assistant's turn"),
        ({"rejected": []}, "does not end with the assistant's turn"),
        ({"prompt": [turn("user", "1"), turn("assistant", "2"), turn("user", "3")]}, "no single question"),
        ({"prompt": None}, "neither prompt nor question"),
        ({"prompt": [turn("user", [{"type": "video"}])]}, "neither text nor image"),
        ({"prompt": [turn("user", None)]}, "a message has no text"),
    ],
)
def test_triples_that_are_not_understood(run, change, message):
    write_records("t.jsonl", [PLAIN, {**PLAIN, **change, "id": "x"}, "text"])
    made, rejected, _ = run("--triples", "t.jsonl")
    assert len(made) == 1
    assert message in rejected[0]["reason"]
    assert [(row["id"], row["row"]) for row in rejected] == [("x", 2), ("row 3", 3)]


def test_triples_are_named_by_their_content_or_their_id(run, tmp_path):
    rows = [PLAIN, {**PLAIN, "id": 5}, {**PLAIN, "id": 5, "rejected": "C."}, {**PLAIN, "id": 5, "question": "?"}, PLAIN]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    made, rejected, _ = run("--triples", "t.json")
    assert [row["id"] for row in made[1:]] == ["5-triples", "5-triples-2"]
    assert made[0]["id"].startswith("triple-")
    assert [row["reason"] for row in rejected] == ["the same pair once more"] * 2
    assert [row["lineage"]["row"] for row in made] == [1, 2, 3]
    assert [row["row"] for row in rejected] == [4, 5]
    (tmp_path / "u.json").write_text(json.dumps([{**PLAIN, "rejected": "C."}, PLAIN]))
    assert made[0]["id"] == run("--triples", "u.json", output="other")[0][1]["id"]  # whatever its place


def test_equal_answers_to_different_questions_are_different_pairs(run):
    write_records("t.jsonl", [{**PLAIN, "id": -1, "prompt": f"<image>\n{n}?"} for n in range(300)])
    made, _, _ = run("--triples", "t.jsonl")
    assert len({row["id"] for row in made}) == 300


def test_text_only_triples_get_no_image_mark(run):
    write_records("t.jsonl", [{"prompt": "Which?", "chosen": "A.", "rejected": "B."}])
    [row], _, _ = run("--triples", "t.jsonl")
    assert row["prompt"] == "Which?"
    assert "image" not in row


def test_interleaved_marks_stay_where_they_are():
    triple = triple_of({**PLAIN, "prompt": "Is <image> above <image>?", "image": ["a.png", "b.png"]})
    assert triple["prompt"] == "Is <image> above <image>?"


@pytest.mark.parametrize("image", [{"bytes": "..."}, [3], ""])
def test_images_that_are_no_paths(run, image):
    write_records("t.jsonl", [PLAIN, {**PLAIN, "image": image, "id": "x"}])
    _, rejected, _ = run("--triples", "t.jsonl")
    assert [row["reason"] for row in rejected] == ["field image holds something else than paths"]


def test_an_image_outside_the_folder_is_refused(run):
    write_records("t.jsonl", [PLAIN, {**PLAIN, "image": "../a.png"}])
    _, [row], _ = run("--triples", "t.jsonl")
    assert row["reason"] == "an image file is missing"
    assert "'..'" in row["detail"]


def test_all_sources_at_once(corrupted, curation):
    write_records("t.jsonl", [{**PLAIN, "id": "7"}])
    more = ("--curated", curation, "--triples", "t.jsonl", "--image_folder", ".")
    made, _, printed = corrupted([annotated("7"), annotated("8")], [answered("7", candidate("A boat."))], *more)
    assert [row["id"] for row in made] == ["7-corrupted", "7-curated", "7-triples"]
    assert Counter(row["source"] for row in made) == {"corrupted": 1, "curated": 1, "triples": 1}
    assert "4 in, 3 pairs, 1 corrupted, 1 curated, 1 triples, 1 rejected, " in printed
    counts = json.loads(Path("out/run.json").read_text())["counts"]
    assert (counts["in"], counts["pairs"], counts["rejected"]) == (4, 3, 1)
    assert len(list(read_pairs("out/pairs.jsonl"))) == 3


def test_a_second_call_is_recognised_and_a_dry_run_writes_nothing(run, tmp_path):
    write_records("t.jsonl", [PLAIN])
    _, _, printed = run("--triples", "t.jsonl", "--dry_run")
    assert "triples      1 records, 1 pairs" in printed
    assert "out/pairs.jsonl (nothing was written)" in printed
    assert not (tmp_path / "out").exists()
    run("--triples", "t.jsonl")
    assert "[pairs] already complete" in run("--triples", "t.jsonl")[2]
    with pytest.raises(UserError, match="seed was 0, now 1"):
        run("--triples", "t.jsonl", "--seed", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no source is given. Fix: "),
        (("--annotated", "t.jsonl"), "--annotated and --corrupted need each other"),
        (("--triples", "nowhere.jsonl"), r"nowhere\.jsonl is no file. Fix: "),
        (("--triples", "t.jsonl", "t.jsonl"), r"t\.jsonl is given twice"),
        (("--triples", "t.jsonl", "--max_per_record", "0"), "--max_per_record is 0"),
        (("--triples", "t.jsonl", "--image_folder", "none"), "mostly: an image file is missing .* Fix: --image_folder"),
        (("--triples", "empty.jsonl"), "the files hold no records"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(run, tmp_path, arguments, message):
    write_records("t.jsonl", [PLAIN])
    write_records("empty.jsonl", [])
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, r"field id is missing or no string\. Fix: "),
        ({"chosen": None}, "field chosen is missing"),
        ({"rejected": "\n"}, "field rejected is empty"),
        ({"rejected": " A. "}, "chosen and rejected are equal"),
        ({"image": ["a.png", "b.png"]}, "field prompt has 1 <image> for 2 images"),
        ({"image": None}, r"field prompt has 1 <image> for 0 images\. Fix: remove <image>"),
    ],
)
def test_checked_again_before_training(tmp_path, change, message):
    check_pair({**PLAIN, "id": "1"}, "here")
    with pytest.raises(RecordError, match=f"here, id .*{message}"):
        check_pair({**PLAIN, "id": "1", **change}, "here")
    write_records(tmp_path / "p.jsonl", [{**PLAIN, "id": "1"}, {**PLAIN, "id": "1"}])
    with pytest.raises(RecordError, match=r"p\.jsonl record 2: id '1' occurs twice"):
        list(read_pairs(tmp_path / "p.jsonl"))
