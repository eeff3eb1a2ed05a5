"""Mixtures in stated proportions."""

import json
import sys

import pytest
from PIL import Image

from llava.errors import UserError
from llava.images import find_image
from llava.records import read_jsonl, write_records
from quality_evaluation import mix


def records(kind: str, count: int, image: str | None = None) -> list[dict]:
    turns = [{"from": "human", "value": "<image>\nHi" if image else "Hi"}, {"from": "gpt", "value": kind}]
    return [{"id": str(n), "conversations": turns, **({"image": image} if image else {})} for n in range(count)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "one" / "a.png")
    write_records(tmp_path / "one" / "captions.jsonl", records("caption", 40, "a.png"))
    (tmp_path / "text.json").write_text(json.dumps(records("text", 30)))

    def call(*parts: str, output: str = "out", more=()) -> list[dict]:
        command = ["mix", "--data", *parts, "--output_dir", tmp_path / output, *more]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        mix.main()
        return list(read_jsonl(tmp_path / output / "mixed.jsonl"))

    return call


def kinds(rows) -> list[str]:
    return [row["conversations"][1]["value"] for row in rows]


def test_numbers_and_shares_are_kept_and_the_order_is_mixed(run):
    rows = run("one/captions.jsonl:18", "text.json:40%")
    assert (kinds(rows).count("caption"), kinds(rows).count("text")) == (18, 12)
    assert kinds(rows) != sorted(kinds(rows))
    assert len({row["id"] for row in rows}) == 30
    assert {row["mixed_from"]["file"] for row in rows} == {"one/captions.jsonl", "text.json"}


def test_the_seed_decides_the_draw(run):
    def sources(output, *more):
        return [row["mixed_from"] for row in run("one/captions.jsonl:10", "text.json:10", output=output, more=more)]

    assert sources("a") == sources("b")
    assert sources("a") != sources("c", "--seed", "1")


def test_images_beside_each_file_are_still_found(run, tmp_path):
    rows = run("one/captions.jsonl:3", "text.json:1")
    assert {row.get("image") for row in rows} == {"one/a.png", None}
    assert find_image(tmp_path, "one/a.png").is_file()  # the folder above both files
    rows = run("one/captions.jsonl:3", output="rooted", more=("--image_folder", "one"))
    assert {row["image"] for row in rows} == {"a.png"}


def test_shares_by_hand():
    assert mix.shares(["", "25%"], [300, 400]) == [300, 100]
    assert mix.shares(["50%", "50%"], [30, 100]) == [30, 30]
    assert mix.shares(["7", ""], [10, 5]) == [7, 5]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("one/captions.jsonl:41",), r"file 1 has 40 records, 41 are wanted"),
        (("one/captions.jsonl", "text.json:100%"), "leave nothing"),
        (("one/captions.jsonl:5", "text.json:90%"), r"file 2 has 30 records, 45 are wanted"),
        (("nowhere.jsonl",), r"nowhere\.jsonl"),
    ],
)
def test_what_cannot_be_mixed_is_named(run, parts, message):
    with pytest.raises((UserError, OSError), match=message):
        run(*parts)


@pytest.mark.parametrize("amounts", [["60%", "30%", "10%"], ["70%", "20%", "10%"], ["40%", "30%", "20%", "10%"]])
def test_shares_that_make_the_whole_fill_it(amounts):
    counts = mix.shares(amounts, [1000] * len(amounts))
    assert counts == [round(1000 / float(amounts[0][:-1]) * float(amount[:-1])) for amount in amounts]


def test_files_by_hand_lose_nothing(run, tmp_path):
    """A last line without its newline, and numbers as ids."""
    rows = [{**record, "id": n} for n, record in enumerate(records("hand", 3))]
    (tmp_path / "hand.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(row["id"] for row in run("hand.jsonl")) == ["0", "1", "2"]
