import base64
import csv
import io
import json
import random

import pytest
from PIL import Image

from llava.ids import read_unique
from llava.model.slicing import plan_slices
from llava.prompts import check_steps, tags_to_steps
from llava.records import read_jsonl
from llava.toy import texts
from llava.toy.pretrain import PATCH, RESOLUTION
from llava.toy.scenes import Scene, Thing, render, sample_scene
from llava.toy.world import BENCHMARKS, build

SCENE = Scene(
    seed=1, width=90, height=90, background="black",
    things=(Thing("circle", "red", "large", "plain", "top left"), Thing("square", "blue", "small", "striped", "top right")),
    printed="7", printed_place="bottom left",
)  # fmt: skip


def test_a_scene_is_a_function_of_its_seed():
    assert sample_scene(5) == sample_scene(5)
    assert render(sample_scene(5)).tobytes() == render(sample_scene(5)).tobytes()
    assert render(sample_scene(5)).size == (sample_scene(5).width, sample_scene(5).height)


def test_every_slice_count_occurs():
    counts = {plan_slices(s.width, s.height, RESOLUTION, PATCH).slices for s in map(sample_scene, range(800))}
    assert counts == {0, 2, 3, 4, 5, 6, 7}  # a grid of one slice cannot occur


def test_objects_are_where_the_scene_says():
    image = render(SCENE)
    assert image.getpixel((22, 22)) == (220, 40, 40)
    assert image.getpixel((80, 80)) == (15, 15, 15)
    right = image.crop((52, 8, 84, 38)).convert("RGB")
    assert max(pixel[2] for pixel in right.get_flattened_data()) == 230


def test_texts_by_hand():
    assert texts.short_caption(SCENE) == "a red circle and a blue square"
    assert texts.description(SCENE) == (
        "A large red circle is at the top left. A small striped blue square is at the top right. "
        "The digit 7 is printed at the bottom left. The background is black."
    )
    assert texts.description_steps(SCENE)[2] == "The red circle is to the left of the blue square."
    asked = {question.kind: question for question in texts.questions(SCENE, random.Random(0))}
    assert asked["count"].answer == "2"
    assert asked["reading"].answer == "7"
    assert (asked["color"].text, asked["color"].answer) in {
        ("What color is the circle?", "red"), ("What color is the square?", "blue")}  # fmt: skip
    assert tags_to_steps(texts.tagged_reasoning(SCENE, asked["count"]))[3] == "2"
    options, letter = texts.multiple_choice(asked["color"], random.Random(0))
    assert options["ABCD".index(letter)] == asked["color"].answer
    assert len(set(options)) == 4


@pytest.mark.parametrize("seed", range(30))
def test_answers_agree_with_the_scene(seed):
    scene = sample_scene(seed)
    for question in texts.questions(scene, random.Random(seed)):
        assert question.answer in question.options
        if question.kind == "exists":
            name = question.text.removeprefix("Is there a").removeprefix("n").removesuffix(" in the image?").strip()
            assert (name in {thing.name for thing in scene.things}) == (question.answer == "yes")


def test_files_have_the_real_formats(world):
    for name in (
        "align.json",
        "captioned.json",
        "instructions.json",
        "unlabelled_images.json",
        "unlabelled_questions.json",
        "reasoning.jsonl",
        "text_only.jsonl",
    ):
        records = list(read_unique(world / name))
        assert records
        for record in records:
            if "image" in record:
                Image.open(world / record["image"]).verify()
    reasoning = next(read_unique(world / "reasoning.jsonl"))
    assert "<image>" not in reasoning["conversations"][0]["value"]  # as in LLaVA-CoT
    mix = list(read_unique(world / "instructions.json"))
    assert any("image" not in record for record in mix)
    placed = [record["conversations"][0]["value"] for record in read_unique(world / "align.json")]
    assert {text.startswith("<image>") for text in placed} == {True, False}  # before or after, as in blip_558k


def test_benchmarks_are_vlmevalkit_tables(world):
    names = set()
    for path in (world / "benchmarks").glob("*.tsv"):
        names.add(path.stem)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert 0 < len(rows) <= 4
        for row in rows:
            Image.open(io.BytesIO(base64.b64decode(row["image"]))).verify()
            assert row["question"]
            assert row["answer"]
    assert names == set(BENCHMARKS)


def test_splits_share_no_scene_and_the_seed_decides(world, tmp_path):
    seeds = {}
    for row in read_jsonl(world / "truth.jsonl"):
        split = row["id"].split("/")[1]
        seeds.setdefault(split, set()).add(row["scene"]["seed"])
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values()))
    again = build(tmp_path / "again", scale=0.03, questions=4)
    for path in [*again.glob("*.json*"), *again.glob("benchmarks/*.tsv")]:
        assert path.read_bytes() == (world / path.relative_to(again)).read_bytes(), path.name
    other = build(tmp_path / "other", seed=1, scale=0.03, questions=4)
    assert json.loads((other / "align.json").read_text()) != json.loads((world / "align.json").read_text())


def test_annotator_answers_are_the_five_steps_but_for_a_few():
    from llava.prompts import FormatError
    from llava.toy.annotator import answer

    good = 0
    for lot in range(400):
        try:
            assert check_steps(answer(f"{lot:08x}", SCENE), 5) == texts.description_steps(SCENE)
            good += 1
        except FormatError as error:
            assert "step 5" in str(error)  # noqa: PT017
            assert lot % 12 == 1
    assert good == 366
