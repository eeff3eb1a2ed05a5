"""Benchmarks: how a TSV is read, what is asked, and what counts as correct."""

import base64
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import UserError
from llava.eval.questions import images_of_row, options_of, question_text, read_tsv
from llava.eval.scoring import rule_for
from llava.images import ImageError


def encoded(color: str, size=(6, 4), kind: str = "PNG", mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice(answer: str = "B", **options: str) -> dict:
    options = options or {"A": "blue square", "B": "red circle", "C": "yellow ring"}
    return {"index": "0", "question": "What is it?", "answer": answer, **options}


# Reading


def test_rows_keep_tabs_quotes_and_line_breaks(tmp_path):
    row = {"index": "1", "image": encoded("red"), "question": 'Say "a\tb"\nor not?', "answer": "é"}
    assert read_tsv(write_tsv(tmp_path / "a.tsv", [row])) == [row]


def test_an_image_longer_than_the_usual_field_limit_is_read(tmp_path):
    row = {"index": "1", "image": "x" * 200_000, "question": "q", "answer": "a"}
    assert len(read_tsv(write_tsv(tmp_path / "a.tsv", [row]))[0]["image"]) == 200_000


@pytest.mark.parametrize("column", ["index", "question", "answer"])
def test_a_missing_column_is_named_with_the_file(tmp_path, column):
    row = {"index": "1", "image": "x", "question": "q", "answer": "a"}
    del row[column]
    path = write_tsv(tmp_path / "a.tsv", [row])
    with pytest.raises(UserError, match=f"a.tsv has no column '{column}'"):
        read_tsv(path)


def test_a_benchmark_needs_images_questions_and_a_file(tmp_path):
    with pytest.raises(UserError, match="neither an image nor an image_path column"):
        read_tsv(write_tsv(tmp_path / "a.tsv", [{"index": "1", "question": "q", "answer": "a"}]))
    (tmp_path / "b.tsv").write_text("index\timage\tquestion\tanswer\n")
    with pytest.raises(UserError, match=r"b\.tsv holds no questions"):
        read_tsv(tmp_path / "b.tsv")
    with pytest.raises(UserError, match=r"c\.tsv is no file"):
        read_tsv(tmp_path / "c.tsv")


def test_a_row_that_ends_early_has_no_options_left(tmp_path):
    (tmp_path / "a.tsv").write_text("index\timage\tquestion\tanswer\tA\tB\n1\tx\tq\tyes\n")
    [row] = read_tsv(tmp_path / "a.tsv")
    assert options_of(row) == {}


# Images


def test_an_image_in_the_row_and_one_by_the_index_of_another_row(tmp_path):
    rows = [
        {"index": "7", "image": encoded("red"), "question": "q", "answer": "a"},
        {"index": "8", "image": "7", "question": "q", "answer": "a"},
    ]
    by_index = {row["index"]: row for row in rows}
    for row in rows:
        [image] = images_of_row(row, by_index, tmp_path)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (6, 4), (255, 0, 0))


def test_several_images_in_a_list_keep_their_order(tmp_path):
    row = {"index": "1", "image": str([encoded("red"), encoded("blue", (2, 3))]), "question": "q", "answer": "a"}
    first, second = images_of_row(row, {"1": row}, tmp_path)
    assert (first.getpixel((0, 0)), second.getpixel((0, 0)), second.size) == ((255, 0, 0), (0, 0, 255), (2, 3))


def test_transparency_lies_over_white(tmp_path):
    row = {"index": "1", "image": encoded("#ff000000", mode="RGBA"), "question": "q", "answer": "a"}
    [image] = images_of_row(row, {"1": row}, tmp_path)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_an_image_by_path_lies_below_the_folder_of_the_file(tmp_path):
    Image.new("RGB", (3, 2), "lime").save(tmp_path / "a.png")
    row = {"index": "1", "image_path": "a.png", "question": "q", "answer": "a"}
    [image] = images_of_row(row, {"1": row}, tmp_path)
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), (0, 255, 0))
    with pytest.raises(ImageError, match=r"absent\.png"):
        images_of_row({**row, "image_path": "absent.png"}, {}, tmp_path)


@pytest.mark.parametrize("image", ["not base64 at all!", base64.b64encode(b"<html></html>" * 20).decode(), "99"])
def test_an_image_that_cannot_be_decoded_is_an_error_that_names_the_row(tmp_path, image):
    row = {"index": "row-41", "image": image, "question": "q", "answer": "a"}
    with pytest.raises(UserError, match="row-41"):
        images_of_row(row, {"row-41": row}, tmp_path)


def test_a_truncated_image_is_an_error_that_names_the_row(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    half = base64.b64encode(buffer.getvalue()[: buffer.tell() // 2]).decode()
    row = {"index": "row-41", "image": half, "question": "q", "answer": "a"}
    with pytest.raises(UserError, match="row-41"):
        images_of_row(row, {"row-41": row}, tmp_path)


# What is asked


def test_a_multiple_choice_question_lists_its_options():
    assert question_text(choice()) == (
        "What is it?\nA. blue square\nB. red circle\nC. yellow ring\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_empty_options_are_left_out_and_a_hint_comes_first():
    row = {**choice("A", A="one", B="", C=" ", D="four"), "hint": "Look up."}
    assert question_text(row).startswith("Look up.\nWhat is it?\nA. one\nD. four\n")


def test_a_question_without_options_asks_for_a_short_answer():
    row = {"index": "0", "question": "How many?", "answer": "3", "hint": ""}
    assert question_text(row) == "How many?\nAnswer the question using a single word or phrase."


def test_an_open_question_is_asked_as_it_is():
    assert question_text({"index": "0", "question": "Describe it.", "answer": "x"}, short=False) == "Describe it."


def test_the_toy_benchmarks_are_answered_fully_by_their_own_answers(world):
    paths = sorted((world / "benchmarks").glob("*.tsv"))
    assert [path.stem for path in paths] == ["ToyCount", "ToyMCQ", "ToyOCR", "ToyPOPE", "ToyRelation", "ToyVQA"]
    for path in paths:
        rows = read_tsv(path)
        assert len(rows) == 4
        assert bool(options_of(rows[0])) == (path.stem == "ToyMCQ")
        for row in rows:
            mark = rule_for(path.stem, rows).mark
            assert mark(row, row["answer"])[1] == 1
            assert not mark(row, "something else")[1]
            [image] = images_of_row(row, {}, world)
            assert image.mode == "RGB"
