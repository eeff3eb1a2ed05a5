"""Decontamination end to end, on drawn images, hand-made benchmark TSVs and counted words."""

import base64
import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import UserError
from llava.images import load_image
from llava.records import RecordError, read_jsonl
from llava.runs import RunError
from quality_evaluation import decontaminate
from quality_evaluation.decontaminate import (
    HammingIndex,
    Look,
    hashes_of,
    look_at,
    look_same,
    resemblance,
    runs_of,
    words_of,
)

ROOT = Path(__file__).resolve().parents[2]
LETTERS = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "i",
    "j",
    "k",
    "l",
    "m",
    "n",
    "o",
    "p",
    "q",
    "r",
    "s",
    "t",
    "u",
    "v",
    "w",
    "x",
    "y",
    "z",
]


def drawing(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Random colours at three scales, the finer the weaker: what a photo is to a perceptual hash."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((3, 0.4), (6, 0.35), (12, 0.25)):
        coarse = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reopened(image: Image.Image, kind: str, **options) -> Image.Image:
    return load_image(io.BytesIO(encoded(image, kind, **options)))


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def record(identifier: str, question: str = "What is this?", answer: str = "A thing.", image=None) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **({"image": image} if image else {}), "conversations": turns}


def row(index, image: Image.Image | bytes, question: str = "Short question?", **fields) -> dict:
    data = image if isinstance(image, bytes) else encoded(image)
    return {"index": index, "image": base64.b64encode(data).decode(), "question": question, "answer": "A", **fields}


def write_tsv(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


class Cleaned:
    """The files of one run, by id."""

    def __init__(self, folder: Path):
        self.kept = list(read_jsonl(folder / "clean.jsonl"))
        self.ids = [row["id"] for row in self.kept]
        self.removed = {row["id"]: row for row in read_jsonl(folder / "removed.jsonl")}
        self.rejected = {row["id"]: row["reason"] for row in read_jsonl(folder / "clean.rejected.jsonl")}
        self.counts = json.loads((folder / "run.json").read_text())["counts"]

    def kinds(self) -> dict[str, str]:
        return {key: row["kind"] for key, row in self.removed.items()}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on files of records and one benchmark called `bench`; returns what it wrote, if anything."""

    def call(*files: list[dict], rows: list[dict] | None = None, more=()) -> Cleaned | None:
        paths = []
        for number, records in enumerate(files):
            paths.append(tmp_path / f"records-{number}.jsonl")
            paths[-1].write_text("".join(json.dumps(item) + "\n" for item in records))
        command = ["decontaminate", "--data_path", ",".join(map(str, paths)), "--output_dir", tmp_path / "out"]
        if rows is not None:
            command += ["--benchmarks", write_tsv(tmp_path / "bench.tsv", rows)]
        monkeypatch.setattr(sys, "argv", list(map(str, [*command, *more])))
        decontaminate.main()
        return Cleaned(tmp_path / "out") if (tmp_path / "out").exists() else None

    return call


# Looks


COPIES = {
    "jpeg 60": lambda image: reopened(image, "JPEG", quality=60),
    "webp 60": lambda image: reopened(image, "WEBP", quality=60),
    "half size": half,
    "half size, jpeg 60": lambda image: reopened(half(image), "JPEG", quality=60),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_looks_the_same_but_is_not_equal(copy):
    images = [drawing(seed) for seed in range(40)]
    pairs = [(look_at(image), look_at(COPIES[copy](image))) for image in images]
    assert sum(look_same(*pair) for pair in pairs) >= 39  # 99.7% of 1,200 such copies were found
    assert all(look.digest != other.digest for look, other in pairs)


def test_different_images_do_not_look_the_same():
    looks = [look_at(drawing(seed)) for seed in range(60)]
    gradient = np.tile(np.arange(0, 240, dtype=np.uint8), (160, 1))
    looks += [look_at(Image.fromarray(turned).convert("RGB")) for turned in (gradient, gradient.T, 239 - gradient)]
    assert not any(look_same(looks[a], looks[b]) for a in range(len(looks)) for b in range(a))


def test_the_same_shapes_in_other_colours_do_not_look_the_same():
    """Gray hashes are blind to this; the thumbnails are not."""
    pixels = np.full((96, 96, 3), 255, dtype=np.uint8)
    pixels[20:60, 30:70] = (200, 0, 0)
    red = look_at(Image.fromarray(pixels))
    pixels[20:60, 30:70] = (0, 60, 214)  # nearly the gray of the red
    blue = look_at(Image.fromarray(pixels))
    assert (red.code ^ blue.code).bit_count() <= 4
    assert not look_same(red, blue)


def test_pixels_of_another_shape_have_another_digest():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8)
    one, other = (Image.fromarray(pixels.reshape(shape)) for shape in ((4, 6, 3), (6, 4, 3)))
    assert one.tobytes() == other.tobytes()
    assert look_at(one).digest != look_at(other).digest


def test_thumbnail_and_code_of_a_half_black_image_by_hand():
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = (255, 0, 128)
    look = look_at(Image.fromarray(pixels))
    cells = np.frombuffer(look.thumbnail, dtype=np.uint8).reshape(8, 8, 3)
    assert cells[:, 0].max() == 0
    assert (cells[:, 7] == (255, 0, 128)).all()
    # constant downwards: beyond the first row of frequencies all is 0, which is the median and not above it
    assert look.code & (1 << 56) - 1 == 0
    # dark to light: the mean is positive, the first frequency negative
    assert look.code >> 62 == 0b10


def test_an_image_of_one_colour_has_a_look():
    white = look_at(Image.new("RGB", (50, 20), "white"))
    assert white.code == 1 << 63  # only the mean is above the median
    assert look_same(white, look_at(Image.new("RGB", (500, 300), "white")))
    assert not look_same(white, look_at(Image.new("RGB", (50, 20), "black")))


def test_photos_are_found_after_re_encoding_and_not_confused(real_data):
    images = [load_image(path) for path in sorted((real_data / "coco_captions" / "images").glob("*.jpg"))[:20]]
    looks = [look_at(image) for image in images]
    for image, look in zip(images, looks, strict=True):
        for copy in COPIES.values():
            assert look_same(look, look_at(copy(image)))
    nearest = min((looks[a].code ^ looks[b].code).bit_count() for a in range(len(looks)) for b in range(a))
    assert nearest >= 16


# The index


@pytest.mark.parametrize("distance", [0, 1, 4, 6])
def test_the_index_finds_what_comparing_all_finds(distance):
    generator = random.Random(distance)
    centres = [generator.getrandbits(64) for _ in range(20)] + [0, 2**64 - 1]
    codes = [generator.getrandbits(64) for _ in range(200)]
    for centre in centres:
        for bits in range(10):
            flipped = generator.sample(range(64), bits)
            codes.append(centre ^ sum(1 << place for place in flipped))
    generator.shuffle(codes)
    index = HammingIndex(distance)
    assert [index.add(code) for code in codes] == list(range(len(codes)))
    for code in [*codes, *centres]:
        apart = [((code ^ other).bit_count(), number) for number, other in enumerate(codes)]
        assert index.near(code) == sorted(pair for pair in apart if pair[0] <= distance)


def test_the_chunks_of_the_index_are_all_bits_once():
    for distance in range(12):
        masks = [mask << shift for shift, mask in HammingIndex(distance).chunks]
        assert len(masks) == distance + 1
        assert sum(masks) == 2**64 - 1
        assert all(not one & other for place, one in enumerate(masks) for other in masks[:place])


# Words


def test_words_are_lower_cased_letters_and_digits():
    assert words_of("<image>\nIt's the 2nd <image 1> BUS_stop, isn't it? 3.5") == (
        ["it", "s", "the", "2nd", "bus", "stop", "isn", "t", "it", "3", "5"]
    )
    assert words_of("  ?! ") == []


def test_runs_by_hand():
    assert list(runs_of(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(runs_of(["a", "b", "c"], 3)) == [("a", "b", "c")]
    assert list(runs_of(["a", "b", "c"], 4)) == []


def test_resemblance_by_hand():
    # a b c, b c d against b c d, c d e: one of three runs is in both
    assert resemblance(hashes_of(["a", "b", "c", "d"]), hashes_of(["b", "c", "d", "e"])) == pytest.approx(1 / 3)
    assert resemblance(hashes_of(["yes"]), hashes_of(["yes"])) == 1
    assert resemblance(hashes_of(["yes"]), hashes_of(["no"])) == 0
    assert resemblance(hashes_of([]), hashes_of([])) == 1
    assert resemblance(hashes_of([]), hashes_of(["yes"])) == 0


def question(words: int) -> str:
    return " ".join(LETTERS[:words]) + "?"


@pytest.mark.parametrize(
    ("asked", "said", "shared"),
    [
        (question(20), " ".join(LETTERS[:13]), LETTERS[:13]),  # the first run of 13
        (question(20), "so: " + ", ".join(LETTERS[7:20]).upper(), LETTERS[7:20]),  # the last one
        (question(20), " ".join(LETTERS[:12]), None),  # 12 words of a long question are too few
        (question(20), " ".join([*LETTERS[:6], "x", *LETTERS[6:18]]), None),  # interrupted: 6 and 12
        (question(13), f"before {question(13)} after", LETTERS[:13]),
        (question(12), f"before {question(12)} after", LETTERS[:12]),  # shorter: as a whole
        (question(12), question(11), None),
        (question(8), f"before {question(8)} after", LETTERS[:8]),
        (question(7), f"before {question(7)} after", None),  # too short to count
    ],
)
@pytest.mark.parametrize("turn", ["human", "gpt"])
def test_boundaries_of_the_ngram_rule(run, asked, said, shared, turn):
    texts = {"question": said} if turn == "human" else {"answer": said}
    cleaned = run([record("1", **texts), record("2")], rows=[row("7", drawing(0), asked)])
    if shared is None:
        assert cleaned.ids == ["1", "2"]
    else:
        assert cleaned.ids == ["2"]
        found = cleaned.removed["1"]
        assert (found["kind"], found["benchmark"], found["index"]) == ("text_ngram", "bench", "7")
        assert found["ngram"] == " ".join(shared)


def test_a_run_does_not_cross_turns_and_system_turns_do_not_count(run):
    split = record("1", " ".join(LETTERS[:7]), " ".join(LETTERS[7:14]))
    system = record("2")
    system["conversations"].insert(0, {"from": "system", "value": question(14)})
    assert run([split, system], rows=[row("1", drawing(0), question(14))]).ids == ["1", "2"]


def test_options_are_compared_too_each_alone(run):
    long_option = " ".join(LETTERS[:9])
    rows = [row("1", drawing(0), "Which?", A="a dog", B=long_option)]
    cleaned = run([record("1", answer=f"It is {long_option}."), record("2", answer="Which a dog or so")], rows=rows)
    assert cleaned.kinds() == {"1": "text_ngram"}


def test_the_length_of_the_runs_can_be_chosen(run):
    records = [record("1", answer=" ".join(LETTERS[3:8])), record("2", answer=" ".join(LETTERS[3:7]))]
    cleaned = run(records, rows=[row("1", drawing(0), question(20))], more=("--ngram", 5))
    assert cleaned.removed["1"]["ngram"] == "d e f g h"
    assert cleaned.ids == ["2"]


@pytest.mark.parametrize(("rows_with_it", "kept", "template_runs"), [(10, ["2"], 0), (11, ["1", "2"], 2)])
def test_the_template_of_a_benchmark_is_not_compared(run, rows_with_it, kept, template_runs):
    """The same words before every question say nothing about one of them: ten rows do, eleven do not."""
    hint = "Hint: please answer the question and provide the correct option letter at the end."  # 14 words
    rows = [row(str(n), drawing(n), f"{hint} {LETTERS[n]}") for n in range(rows_with_it)]
    cleaned = run([record("1", hint), record("2")], rows=rows)
    assert cleaned.ids == kept
    # 14 words have two runs of 13; a run that ends with the row's own letter occurs once
    assert cleaned.counts["template_runs"] == template_runs


# Images end to end


def test_every_kind_and_what_it_matched(run, tmp_path):
    image = drawing(1)
    image.save(tmp_path / "same.png")
    reopened(image, "JPEG", quality=60).save(tmp_path / "copy.png")
    drawing(2).save(tmp_path / "other.png")
    records = [
        record("exact", image="same.png"),
        record("copy", image="copy.png"),
        record("text", question(13), image="other.png"),
        record("stays", image="other.png", answer="ein Käfer"),
        record("words only"),
    ]
    cleaned = run(records, rows=[row("11", drawing(3), question(13)), row("12", image)])
    assert cleaned.kinds() == {"exact": "image_exact", "copy": "image_perceptual", "text": "text_ngram"}
    assert cleaned.removed["exact"] == {
        "id": "exact",
        "file": str(tmp_path / "records-0.jsonl"),
        "kind": "image_exact",
        "benchmark": "bench",
        "index": "12",
        "image": "same.png",
    }
    assert cleaned.removed["copy"]["index"] == "12"
    assert 0 <= cleaned.removed["copy"]["distance"] <= 4
    assert cleaned.removed["text"]["index"] == "11"
    assert cleaned.kept == records[3:]
    assert cleaned.counts == {
        "in": 5, "kept": 2, "image_exact": 1, "image_perceptual": 1, "text_ngram": 1, "near_duplicate": 0,
        "rejected": 0, "benchmark_rows": 2, "template_runs": 0,
    }  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_turn_in_record_or_benchmark_changes_nothing(run, tmp_path, orientation):
    upright = drawing(4)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned.png").write_bytes(encoded(stored, "PNG", exif=exif))
    (tmp_path / "upright.webp").write_bytes(encoded(upright, "WEBP", lossless=True))
    drawing(5).save(tmp_path / "other.png")
    rows = [row("1", drawing(6)), row("2", encoded(stored, "PNG", exif=exif))]
    images = ("turned.png", "upright.webp", "other.png")
    cleaned = run([record(name, image=name) for name in images], rows=rows)
    assert cleaned.kinds() == {"turned.png": "image_exact", "upright.webp": "image_exact"}


def test_png_and_jpeg_of_the_same_pixels_are_equal(run, tmp_path):
    jpeg = encoded(drawing(7), "JPEG", quality=80)
    load_image(io.BytesIO(jpeg)).save(tmp_path / "pixels.png")
    (tmp_path / "file.jpg").write_bytes(jpeg)
    drawing(8).save(tmp_path / "other.png")
    records = [record(name, image=name) for name in ("pixels.png", "file.jpg", "other.png")]
    assert run(records, rows=[row("1", jpeg)]).kinds() == {"pixels.png": "image_exact", "file.jpg": "image_exact"}


def test_any_image_of_a_record_and_any_of_a_row_counts(run, tmp_path):
    for seed in range(4):
        drawing(seed).save(tmp_path / f"{seed}.png")
    several = [base64.b64encode(encoded(drawing(seed))).decode() for seed in (8, 3)]
    records = [record("1", image=["0.png", "3.png"]), record("2", image=["0.png", "1.png"])]
    cleaned = run(records, rows=[{"index": "1", "image": str(several), "question": "?", "answer": "A"}])
    assert cleaned.ids == ["2"]
    assert cleaned.removed["1"]["image"] == "3.png"


def test_image_paths_references_and_folders_of_benchmarks(run, tmp_path):
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    for seed in range(3):
        drawing(seed).save(tmp_path / f"{seed}.png")
    drawing(0).save(benchmarks / "zero.png")
    rows = [{"index": "1", "image_path": "zero.png", "question": "?", "answer": "A"}]
    write_tsv(benchmarks / "paths.tsv", rows)
    again = {"index": "9", "image": "5", "question": question(13), "answer": "A"}
    write_tsv(benchmarks / "inside.tsv", [row("5", drawing(1)), again])
    records = [record(str(seed), image=f"{seed}.png") for seed in range(3)] + [record("text", question(13))]
    cleaned = run(records, more=("--benchmarks", benchmarks))
    assert {key: (found["benchmark"], found["index"]) for key, found in cleaned.removed.items()} == {
        "0": ("paths", "1"),
        "1": ("inside", "5"),
        "text": ("inside", "9"),
    }


def test_order_and_content_are_kept_over_many_batches_and_files(run, monkeypatch, tmp_path):
    monkeypatch.setattr(decontaminate, "BATCH", 3)
    for seed in range(5):
        drawing(seed).save(tmp_path / f"{seed}.png")
    files = [
        [{**record(str(n), image=f"{n % 5}.png"), "own": [n, 1.5, None, "ü"]} for n in range(11)],
        [{**record(str(n), image=f"{n % 5}.png"), "own": n} for n in range(7)],
    ]
    cleaned = run(*files, rows=[row("1", drawing(2))])
    assert cleaned.kept == [item for items in files for item in items if item["image"] != "2.png"]
    assert cleaned.counts["image_exact"] == 3  # 2 and 7 of the first file, 2 of the second


def test_unreadable_images_are_rejected_and_the_run_goes_on(run, tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(drawing(0))[:200])
    drawing(1).save(tmp_path / "good.png")
    names = ("cut.png", "absent.png", "../secret.png", "good.png")
    cleaned = run([record(name, image=name) for name in names], rows=[row("1", drawing(2))])
    assert cleaned.ids == ["good.png"]
    assert cleaned.removed == {}
    assert set(cleaned.rejected) == set(names) - {"good.png"}
    for name, reason in cleaned.rejected.items():
        assert name in reason
    assert cleaned.counts["rejected"] == 3


def test_another_image_folder(run, tmp_path):
    (tmp_path / "images").mkdir()
    drawing(0).save(tmp_path / "images" / "a.png")
    rows, more = [row("1", drawing(0))], ("--image_folder", tmp_path / "images")
    assert run([record("1", image="a.png"), record("2")], rows=rows, more=more).ids == ["2"]


# Near duplicates


def test_near_duplicates_go_and_other_questions_about_the_same_image_stay(run, tmp_path):
    image = drawing(1)
    image.save(tmp_path / "one.png")
    (tmp_path / "copy.jpg").write_bytes(encoded(half(image), "JPEG", quality=60))
    drawing(2).save(tmp_path / "two.png")
    caption = " ".join(f"word{n}" for n in range(42))  # 40 runs of three words
    one_word_more = caption.replace("word20", "word20 indeed")  # loses 2 runs, gains 3: 38 / 43
    other_half = caption.replace("word9 ", "x ").replace("word20 ", "x ").replace("word30 ", "x ")  # 31 / 49
    ask = "<image>\nDescribe the image."
    records = [
        record("first", ask, caption, "one.png"),
        record("same", "Describe the image! <image>", caption.upper(), "one.png"),
        record("copy", ask, one_word_more, "copy.jpg"),
        record("other question", "<image>\nWhat is it?", caption, "one.png"),
        record("other answer", ask, other_half, "one.png"),
        record("other image", ask, caption, "two.png"),
        record("no image", ask.removeprefix("<image>\n"), caption),
        record("no image again", ask.removeprefix("<image>\n"), caption),
        record("two images", "<image>\n<image>\nDescribe the image.", caption, ["one.png", "two.png"]),
        record("two images again", "<image>\n<image>\nDescribe the image.", caption, ["copy.jpg", "two.png"]),
        record("two others", "<image>\n<image>\nDescribe the image.", caption, ["one.png", "one.png"]),
    ]
    cleaned = run(records, more=("--near_duplicates",))
    assert cleaned.kinds() == dict.fromkeys(["same", "copy", "two images again"], "near_duplicate")
    assert {key: found["earlier_id"] for key, found in cleaned.removed.items()} == {
        "same": "first", "copy": "first", "two images again": "two images",
    }  # fmt: skip
    assert cleaned.removed["same"]["resemblance"] == 1
    assert cleaned.removed["copy"]["resemblance"] == round(38 / 43, 3)
    assert cleaned.kept == [item for item in records if item["id"] not in cleaned.removed]
    assert cleaned.counts["near_duplicate"] == 3


def test_without_the_flag_repeats_stay(run, tmp_path):
    drawing(1).save(tmp_path / "one.png")
    records = [record(str(n), image="one.png") for n in range(3)]
    assert run(records, rows=[row("1", drawing(2))]).ids == ["0", "1", "2"]


def test_near_duplicates_across_files_name_the_earlier_file(run, tmp_path):
    drawing(1).save(tmp_path / "one.png")
    cleaned = run([record("1", image="one.png")], [record("1", image="one.png")], more=("--near_duplicates",))
    assert cleaned.ids == ["1"]
    [found] = cleaned.removed.values()
    assert (found["file"], found["earlier_file"]) == tuple(str(tmp_path / f"records-{n}.jsonl") for n in (1, 0))


def test_a_removed_record_is_no_earlier_one(run, tmp_path):
    """Of two equal records the first goes because of the benchmark; so does the second, not as its duplicate."""
    drawing(1).save(tmp_path / "one.png")
    records = [record("1", question(13), image="one.png"), record("2", question(13), image="one.png"), record("3")]
    cleaned = run(records, rows=[row("1", drawing(2), question(13))], more=("--near_duplicates",))
    assert cleaned.kinds() == {"1": "text_ngram", "2": "text_ngram"}


# The folder, and wrong input


def test_a_rerun_is_complete_and_other_arguments_are_refused(run, tmp_path, capsys):
    records, rows = [record("1", question(13)), record("2")], [row("1", drawing(0), question(13))]
    run(records, rows=rows)
    assert "[decontaminate] 2 in, 1 kept, 0 image exact, 0 image perceptual, 1 text ngram" in capsys.readouterr().out
    before = (tmp_path / "out" / "clean.jsonl").stat()
    run(records, rows=rows)
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "out" / "clean.jsonl").stat() == before
    with pytest.raises(RunError, match="ngram was 13, now 12"):
        run(records, rows=rows, more=("--ngram", 12))
    with pytest.raises(RunError, match="changed since the run"):
        run(records, rows=[*rows, row("2", drawing(1))])


def test_an_interrupted_run_is_done_again(run, monkeypatch, tmp_path):
    drawing(1).save(tmp_path / "one.png")
    records, rows = [record(str(n), image="one.png") for n in range(4)], [row("1", drawing(0))]

    def stop(path, values):
        for _ in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decontaminate, "write_records", stop)
        with pytest.raises(KeyboardInterrupt):
            run(records, rows=rows)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert run(records, rows=rows).ids == ["0", "1", "2", "3"]


def test_a_dry_run_counts_and_writes_nothing(run, tmp_path, capsys):
    run([record("1"), record("2")], [record("3")], rows=[row("1", drawing(0))], more=("--dry_run",))
    printed = capsys.readouterr().out
    assert "records      3, images below" in printed
    assert "with 1 rows of 1 benchmarks" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (None, (), "nothing to compare with"),
        (None, ("--benchmarks", "tests"), "nothing to compare with"),
        (None, ("--benchmarks", "absent.tsv"), "absent.tsv does not exist"),
        ([row("1", drawing(0))], ("--ngram", "1"), "--ngram is 1. Fix: "),
        ([row("1", b"no image")], (), r"bench\.tsv, index 1: row 1: the image cannot be decoded"),
        ([row("3", encoded(drawing(0))[:100])], (), r"bench\.tsv, index 3: .*Fix: "),
        ([{"index": "1", "image_path": "gone.png", "question": "?", "answer": "A"}], (), r"index 1: .*gone\.png"),
        ([{"index": "1", "image": "", "question": "?", "answer": "A"}], (), "index 1: the row has no image"),
        ([{"index": "1", "image": "", "answer": "A"}], (), "has no column 'question'"),
    ],
)
def test_wrong_input_is_one_sentence(run, tmp_path, rows, more, message):
    with pytest.raises(UserError, match=message):
        run([record("1")], rows=rows, more=more)
    assert not (tmp_path / "out" / "clean.jsonl").exists()


def test_nothing_left_is_an_error_that_says_why(run, tmp_path):
    with pytest.raises(UserError, match=r"is left: 0 removed, 1 with an unreadable image; the first: .*absent\.png"):
        run([record("1", image="absent.png")], rows=[row("1", drawing(0))])
    assert not (tmp_path / "out" / "clean.jsonl").exists()


def test_files_given_twice_and_in_several_folders_are_refused(run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.jsonl").write_text(json.dumps(record("1")) + "\n")
    records = tmp_path / "records-0.jsonl"
    with pytest.raises(UserError, match="given twice"):
        run([record("1")], rows=[row("1", drawing(0))], more=("--data_path", f"{records},{records}"))
    several = ("--data_path", f"{records},{tmp_path / 'sub' / 'more.jsonl'}")
    with pytest.raises(UserError, match="several folders"):
        run([record("1")], rows=[row("1", drawing(0))], more=several)
    rows, more = [row("1", drawing(0))], (*several, "--image_folder", tmp_path)
    assert run([record("1")], rows=rows, more=more).ids == ["1", "1"]


def test_broken_records_are_refused(run):
    with pytest.raises(RecordError, match="id '1' occurs twice"):
        run([record("1"), record("1")], rows=[row("1", drawing(0))])


def test_the_command_reports_one_sentence(tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps(record("1")) + "\n")
    command = [sys.executable, "-m", "quality_evaluation.decontaminate", "--data_path", tmp_path / "records.jsonl"]
    result = subprocess.run([*command, "--output_dir", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing to compare with. Fix: ")
    assert "Traceback" not in result.stderr


def test_a_look_is_small():
    look = look_at(drawing(0))
    assert isinstance(look, Look)
    assert (len(look.digest), len(look.thumbnail)) == (32, 192)
    assert 0 <= look.code < 2**64
