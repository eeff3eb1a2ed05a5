"""Caption measures against arithmetic done by hand, and the command on small files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava.errors import UserError
from llava.eval.caption_measures import (
    VALUES,
    Vocabulary,
    common_length,
    content_overlap,
    object_counts,
    repetition,
    rouge_l,
    vocabulary_of,
)
from llava.eval.captions import captions_of, estimates, named_files, read_truth
from llava.prompts import COD_HEADINGS, render_steps
from llava.records import read_jsonl, write_json, write_records

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = "dog, puppy\nhot dog\ncat\nperson, man, woman\nbus\n"


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary([line.split(", ") for line in VOCABULARY.splitlines()])


def caption(identifier: str, text: str, **fields) -> dict:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}]
    return {"id": identifier, "image": f"{identifier}.jpg", "conversations": turns, **fields}


def candidates(identifier: str, *texts: str, **fields) -> dict:
    record = caption(identifier, "")
    record["conversations"].pop()
    return {**record, "candidates": [{"text": text} for text in texts], **fields}


def test_object_counts_by_hand(vocabulary):
    counts = object_counts("A man and his dogs. The puppy chases a cat.", {"dog", "person", "bus"}, vocabulary)
    assert counts.named == ["person", "dog", "dog", "cat"]
    assert counts.present == ["person", "dog", "dog"]
    assert counts.hallucinated == ["cat"]
    assert object_counts("A puppy.", {"Dogs"}, vocabulary).hallucinated == []  # what is present may have any name
    assert object_counts("", {"dog"}, vocabulary) == ([], [], [])


def test_the_longest_name_is_found_first_and_only_whole_words(vocabulary):
    assert vocabulary.mentions("A dog eats a hot dog") == ["dog", "hot dog"]
    assert vocabulary.mentions("two HOT-DOGS") == ["hot dog"]
    assert Vocabulary([["train"], ["train station"]]).mentions("Trains leave a train station.") == [
        "train",
        "train station",
    ]
    assert vocabulary.mentions("The day is hot. Dogs sleep; it is too hot, dogs sleep.") == ["dog", "dog"]
    assert vocabulary.mentions("A category of doggerel, the busboy") == []


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("sandwich", "sandwiches"), ("strawberry", "strawberries"), ("toy", "toys"),
        ("person", "people"), ("person", "persons"), ("man", "men"), ("woman", "women"), ("child", "children"),
        ("snowman", "snowmen"), ("potato", "potatoes"), ("photo", "photos"), ("knife", "knives"),
        ("teddy bear", "teddy bears"),
    ],
)  # fmt: skip
def test_plurals_are_the_same_object(name, many):
    assert Vocabulary([[name]]).mentions(f"Here are {many}, one {name}.") == [name, name]


def test_words_that_only_look_like_plurals_are_not():
    assert Vocabulary([["bus"], ["city"]]).mentions("buss busies citys") == []


def test_a_written_name_goes_before_a_plural_and_listed_plurals_are_no_second_object():
    written = Vocabulary([["glass", "cup"], ["glasses", "spectacles"]])
    assert written.mentions("glasses, a glass, cups") == ["glasses", "glass", "glass"]
    listed = vocabulary_of(["Dogs", "dog", "hot-dog", "hot dog"])
    assert listed.objects == 2
    assert listed.mentions("dogs and a dog") == ["dog", "dog"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [([["dog"], ["cat", "dog"]], "'dog' is on two lines"), ([["dog", "!"]], "'!' has no letters"), ([], "is empty")],
)
def test_a_vocabulary_that_means_nothing_is_refused(lines, message):
    with pytest.raises(UserError, match=message):
        Vocabulary(lines)


def test_content_words_by_hand():
    # caption: red bus, street (3; "a", "on", "the" are stop words); reference: red bus, parked, near, tree (5); shared 2
    precision, recall, f1 = content_overlap("A red bus on the street. A red bus.", "The red bus is parked near a tree")
    assert (precision, recall) == pytest.approx((2 / 3, 2 / 5))
    assert f1 == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))  # 0.5
    assert content_overlap("", "a bus") == (0, 0, 0)
    assert content_overlap("it is on the", "it is on the") == (0, 0, 0)


def test_rouge_l_by_hand():
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    # common: a b c; precision 3/3, recall 3/6
    assert rouge_l("a b c", "a x b y c z") == pytest.approx(2 * 0.5 / 1.5)
    assert rouge_l("", "a b") == rouge_l("a b", "") == 0


def test_the_common_subsequence_equals_the_table_of_all_prefixes():
    rng = random.Random(0)
    for _ in range(60):
        one, other = (rng.choices("abcde", k=rng.randrange(90)) for _ in range(2))
        lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
        for i, a in enumerate(one, 1):
            for j, b in enumerate(other, 1):
                lengths[i, j] = lengths[i - 1, j - 1] + 1 if a == b else max(lengths[i - 1, j], lengths[i, j - 1])
        assert common_length(one, other) == lengths[-1, -1]


def test_repetition_by_hand():
    assert repetition(list("abcde")) == 0
    assert repetition(list("abc")) == 0
    # a b c d, b c d a, c d a b, d a b c, a b c d: four different ones of five
    assert repetition(list("abcdabcd")) == pytest.approx(1 / 5)


def test_captions_of_every_kind_of_record():
    assert captions_of(candidates("1", "one", "two"), "file") == ["one", "two"]
    assert captions_of(candidates("1", "one", "two", decision={"chosen": 1}), "file") == ["two"]
    assert captions_of(caption("1", "said"), "file") == ["said"]
    assert captions_of(candidates("1"), "file") == []
    for broken in (
        {"candidates": [{"caption": "a"}]},
        {"candidates": 3},
        {"candidates": [], "decision": {"chosen": 4}},
    ):
        with pytest.raises(UserError, match="id '1': its candidates have no text"):
            captions_of({**caption("1", ""), **broken}, "file")


def test_files_have_names(tmp_path):
    assert named_files("runs/a.jsonl,SICOG=b=2/c.jsonl") == {"a": "runs/a.jsonl", "SICOG": "b=2/c.jsonl"}
    (tmp_path / "lr=1.jsonl").touch()
    assert named_files(f"{tmp_path}/lr=1.jsonl") == {"lr=1": f"{tmp_path}/lr=1.jsonl"}
    with pytest.raises(UserError, match="two files called 'candidates'"):
        named_files("a/candidates.jsonl,b/candidates.jsonl")


def test_references_and_objects_as_they_are_published(tmp_path):
    rows = [
        {"id": 7, "captions": ["A dog.", " "], "objects": [{"category": "dog", "bbox": [0, 0, 1, 1]}, {"name": "cat"}]},
        caption("8", "A bus.", captions=["One bus."], objects=["bus"]),
        caption("9", "Nothing known."),
    ]
    write_json(tmp_path / "references.json", rows)
    write_json(tmp_path / "objects.json", {"8": [{"label": "tram"}], "10": []})
    truth = read_truth(str(tmp_path / "references.json"), str(tmp_path / "objects.json"))
    assert truth == {
        "7": (["A dog."], ["dog", "cat"]),
        "8": (["A bus.", "One bus."], ["tram"]),
        "9": (["Nothing known."], None),
        "10": ([], []),
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "captions": "A dog."}, "captions is not a list of strings"),
        ({"id": "1", "objects": ["dog", 3]}, "objects is not a list of names"),
        ({"id": "1", "objects": [{"bbox": []}]}, "objects is not a list of names"),
        ({"id": "1"}, "conversations is missing"),
        ("1", "is a str, not an object"),
    ],
)
def test_references_that_cannot_be_used_are_named(tmp_path, row, message):
    write_json(tmp_path / "references.json", [row])
    with pytest.raises(UserError, match=rf"references\.json record 1.*{message}.*Fix: "):
        read_truth(str(tmp_path / "references.json"), None)


# three images, one caption each:
#   1 shows dog, person       says person, dog, dog, cat     4 mentions, 1 hallucinated, 2 of 2 covered
#   2 shows bus, person       says bus                       1 mention,                  1 of 2 covered
#   3 shows cat               says hot dog, hot dog          2 mentions, 2 hallucinated, 0 of 1 covered
OBJECTS = {"1": ["dog", "person"], "2": ["bus", "man"], "3": ["cat"]}
SAID = {"1": "A man and his dogs. The puppy chases a cat.", "2": "A bus.", "3": "A hot dog beside a hot dog."}
TRUE = {"1": "A man walks two dogs.", "2": "A woman boards a red bus.", "3": "A cat sleeps."}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_json(tmp_path / "objects.json", OBJECTS)
    (tmp_path / "vocabulary.txt").write_text(VOCABULARY)
    write_records(tmp_path / "references.jsonl", [caption(key, text) for key, text in TRUE.items()])
    write_records(tmp_path / "said.jsonl", [caption(key, text) for key, text in SAID.items()])
    return tmp_path


def run(folder: Path, *flags: str, output: str = "out", expect: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava.eval.captions", "--output_dir", output, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def measures(folder: Path, name: str, output: str = "out") -> dict:
    found = json.loads((folder / output / "captions.json").read_text())["names"][name]["measures"]
    return {key: estimate and estimate["value"] for key, estimate in found.items()}


WORDS = ("--objects", "objects.json", "--vocabulary", "vocabulary.txt")


def test_chair_by_hand(folder):
    run(folder, "--data_path", "said.jsonl", *WORDS)
    found = measures(folder, "said")
    assert found["chair_i"] == pytest.approx(3 / 7, abs=1e-6)  # of all mentions; the mean of 1/4, 0 and 1 is less
    assert found["chair_s"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["coverage"] == pytest.approx(3 / 5, abs=1e-6)
    assert [found[key] for key in ("named", "present", "hallucinated")] == pytest.approx([7 / 3, 4 / 3, 1], abs=1e-6)
    assert found["words"] == pytest.approx((10 + 2 + 7) / 3, abs=1e-6)
    assert found["distinct"] == pytest.approx((9 + 2 + 4) / 3, abs=1e-6)
    assert found["f1"] is None  # no reference
    interval = json.loads((folder / "out" / "captions.json").read_text())["names"]["said"]["measures"]["chair_s"]
    assert (interval["low"], interval["high"]) == pytest.approx((0.207660, 0.938510), abs=1e-4)  # Wilson, 2 of 3
    rows = list(read_jsonl(folder / "out" / "per_image.jsonl"))
    assert [row["hallucinated_objects"] for row in rows] == [["cat"], [], ["hot dog"]]
    assert [row["chair_i"] for row in rows] == [0.25, 0, 1]


def test_what_a_reference_names_is_present_too_and_the_best_reference_counts(folder):
    extra = caption("1", TRUE["1"], captions=["The puppy chases a cat."])
    write_records(folder / "more.jsonl", [extra, caption("2", TRUE["2"]), caption("3", TRUE["3"])])
    run(folder, "--data_path", "said.jsonl", "--references", "more.jsonl", *WORDS)
    found = measures(folder, "said")
    assert found["chair_i"] == pytest.approx(2 / 7, abs=1e-6)  # the cat of image 1 is named by its second reference
    # image 1: man dogs puppy chases cat against man walks two dogs (2/5, 2/4), puppy chases cat (3/5, 3/3): the second
    # image 2: bus against woman boards red bus (1, 1/4): 2/5; image 3: hot dog beside against cat sleeps: 0
    assert found["precision"] == pytest.approx((3 / 5 + 1) / 3, abs=1e-6)
    assert found["recall"] == pytest.approx((1 + 1 / 4) / 3, abs=1e-6)
    assert found["f1"] == pytest.approx((3 / 4 + 2 / 5) / 3, abs=1e-6)
    # words in order: the puppy chases a cat, 5 of 10 and 5 of 5; a bus, 2 of 2 and 2 of 6; a, 1 of 7 and 1 of 3
    assert found["rouge_l"] == pytest.approx((10 / 15 + 4 / 8 + 2 / 10) / 3, abs=1e-6)


def test_without_objects_and_vocabulary_nothing_is_said_about_objects(folder):
    printed = run(folder, "--data_path", "said.jsonl", "--references", "references.jsonl").stdout
    assert "ROUGE-L" in printed
    assert "CHAIR" not in printed
    assert "objects" not in printed
    assert measures(folder, "said")["chair_i"] is None


def test_a_vocabulary_alone_takes_objects_from_the_references_and_says_so(folder):
    flags = ("--references", "references.jsonl", "--vocabulary", "vocabulary.txt")
    printed = run(folder, "--data_path", "said.jsonl", *flags).stdout
    # references name person, dog; person, bus; cat: the same as the lists
    assert measures(folder, "said")["chair_i"] == pytest.approx(3 / 7, abs=1e-6)
    assert "present is what a reference names" in printed


def test_candidates_are_averaged_by_image_before_images_are(folder):
    rows = [candidates("1", "A cat.", "A cat.", "A dog."), candidates("2", "A bus.")]
    write_records(folder / "several.jsonl", rows)
    run(folder, "--data_path", "several.jsonl", *WORDS)
    found = measures(folder, "several")
    assert found["chair_s"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)  # not 2 of 4
    assert found["chair_i"] == pytest.approx((2 / 3) / 2, abs=1e-6)


def test_the_final_description_or_all_steps_without_headings(folder):
    steps = render_steps(COD_HEADINGS, ["A cat.", "A cat.", "A cat.", "A bus.", "A dog."])
    write_records(folder / "steps.jsonl", [caption("1", steps)])
    run(folder, "--data_path", "steps.jsonl", *WORDS)
    final = measures(folder, "steps")
    assert (final["words"], final["named"], final["hallucinated"]) == (2, 1, 0)
    run(folder, "--data_path", "steps.jsonl", "--part", "whole", *WORDS, output="whole")
    whole = measures(folder, "steps", "whole")
    assert (whole["words"], whole["named"], whole["hallucinated"]) == (10, 5, 4)


def test_an_empty_caption_scores_nothing_and_is_counted(folder):
    write_records(folder / "empty.jsonl", [caption("1", " "), caption("2", TRUE["2"])])
    run(folder, "--data_path", "empty.jsonl", "--references", "references.jsonl", *WORDS)
    found = measures(folder, "empty")
    assert [found[key] for key in ("empty", "f1", "rouge_l", "chair_s")] == [0.5, 0.5, 0.5, 0]
    assert found["coverage"] == 0.5  # 0 of 2 and 2 of 2
    first = next(read_jsonl(folder / "out" / "per_image.jsonl"))
    assert first["chair_i"] is None  # nothing is named


def test_the_difference_is_of_the_images_that_both_have(folder):
    better = [caption("1", "A man and a dog."), caption("3", "A cat."), caption("unknown", "A bus.")]
    write_records(folder / "better.jsonl", [*better, candidates("2")])
    printed = run(folder, "--data_path", "old=said.jsonl,new=better.jsonl", *WORDS).stdout
    result = json.loads((folder / "out" / "captions.json").read_text())["last_minus_first"]
    assert result["images"] == 2
    # images 1 and 3: 3 of 6 mentions were hallucinated, now 0 of 3; whatever is drawn, at least a quarter was
    assert result["measures"]["chair_i"]["value"] == pytest.approx(-0.5)
    assert (result["measures"]["chair_i"]["low"], result["measures"]["chair_i"]["high"]) == (-1, -0.25)
    header = [cell.strip() for cell in printed.splitlines()[0].strip("|").split("|")]
    assert header == ["measure", "old", "new", "new - old"]
    assert "-50.0 (-100.0 to -25.0)" in printed
    assert (folder / "out" / "captions.md").read_text() in printed
    rejected = list(read_jsonl(folder / "out" / "captions.rejected.jsonl"))
    assert [(row["id"], row["reason"]) for row in rejected] == [
        ("unknown", "no reference and no list of objects has this id"), ("2", "the record has no caption"),
    ]  # fmt: skip
    assert "new: 2 records are left out" in printed


def test_an_image_without_its_list_takes_no_part_in_hallucination(folder):
    write_json(folder / "objects.json", {"2": ["bus"]})
    printed = run(folder, "--data_path", "said.jsonl", "--references", "references.jsonl", *WORDS).stdout
    assert measures(folder, "said")["chair_s"] == 0
    assert "said: 2 of 3 images have no list of objects." in printed


def test_listed_objects_outside_the_vocabulary_are_reported(folder):
    write_json(folder / "objects.json", {"1": ["dog", "zebra"]})
    printed = run(folder, "--data_path", "said.jsonl", *WORDS).stdout
    assert "not in the vocabulary, so not looked for: zebra." in printed
    assert measures(folder, "said")["coverage"] == 1
    write_json(folder / "objects.json", {"1": ["zebra"]})
    error = run(folder, "--data_path", "said.jsonl", *WORDS, output="none", expect=2).stderr
    assert "none of the listed objects ('zebra', ...) is in the vocabulary. Fix: " in error


def test_intervals_are_those_of_a_mean_and_of_a_paired_difference():
    rng = random.Random(0)
    words = [rng.randrange(10, 50) for _ in range(400)]
    files = [[{**dict.fromkeys(VALUES, 0.0), "images": 1, "words": n + more} for n in words] for more in (0, 3)]
    alone, paired = estimates(files[:1], 0)["words"], estimates(files, 0)["words"]
    half = 1.96 * np.std(words) / np.sqrt(400)
    assert alone["value"] == pytest.approx(np.mean(words), abs=1e-6)
    assert (alone["low"], alone["high"]) == pytest.approx(
        (np.mean(words) - half, np.mean(words) + half), abs=0.1 * half
    )
    assert paired == {"value": 3, "low": 3, "high": 3}  # every image has three more, whatever is drawn
    assert estimates(files, 0)["chair_i"] is None


def test_the_same_command_gives_the_same_bytes_and_is_complete_the_second_time(folder):
    for name, text in (("said", "A dog, a cat and"), ("references", "A dog")):
        write_records(folder / f"{name}.jsonl", [caption(str(n), f"{text} the bus" + " x" * n) for n in range(30)])
    flags = ("--data_path", "said.jsonl", "--references", "references.jsonl", "--objects", "objects.json")
    run(folder, *flags)
    run(folder, *flags, output="again")
    run(folder, *flags, "--seed", "1", output="other")
    for name in ("captions.json", "captions.md", "per_image.jsonl"):
        assert (folder / "out" / name).read_bytes() == (folder / "again" / name).read_bytes()
    assert (folder / "out" / "captions.json").read_bytes() != (folder / "other" / "captions.json").read_bytes()
    assert "already complete" in run(folder, *flags).stdout
    assert "belongs to another run" in run(folder, *flags, "--seed", "1", expect=2).stderr


def test_a_dry_run_checks_and_writes_nothing(folder):
    printed = run(folder, "--data_path", "said.jsonl", *WORDS, "--dry_run").stdout
    assert "3 images, 3 captions" in printed
    assert "nothing was written" in printed
    assert not (folder / "out").exists()
    run(folder, "--data_path", "said.jsonl", "--references", "absent.json", "--dry_run", expect=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to compare with. Fix: give --references or --objects"),
        (("--references", "absent.json"), "absent.json: is no file. Fix: "),
        (("--objects", "absent.json"), "absent.json: No such file or directory. Fix: "),
        (("--objects", "objects.json", "--vocabulary", "absent.txt"), "absent.txt: No such file or directory. Fix: "),
        (
            ("--references", "other.jsonl"),
            "its first id is '1', that of the references 'x'. Fix: give both the same ids",
        ),
        (("--references", "blank.jsonl"), "no reference has a caption or objects. Fix: "),
    ],
)
def test_bad_input_is_one_sentence_with_a_fix(folder, flags, message):
    write_records(folder / "other.jsonl", [caption("x", "A dog.")])
    write_records(folder / "blank.jsonl", [caption("1", " ")])
    error = run(folder, "--data_path", "said.jsonl", *flags, expect=2).stderr
    assert message in error
    assert len(error.splitlines()) == 1


def test_every_value_of_a_measure_is_counted(vocabulary):
    from llava.eval.caption_measures import measure

    values, _ = measure("A cat.", ["A dog."], {"dog"}, vocabulary)
    assert values.keys() == set(VALUES)


def test_real_photos_human_captions_beat_captions_of_other_photos(real_data, tmp_path):
    rows = list(read_jsonl(real_data / "coco_captions" / "captions.jsonl"))
    write_records(tmp_path / "references.jsonl", [{**row, "captions": row["captions"][1:]} for row in rows])
    write_records(tmp_path / "human.jsonl", [caption(str(row["id"]), row["captions"][0]) for row in rows])
    others = [*rows[1:], rows[0]]
    wrong = [caption(str(row["id"]), other["captions"][0]) for row, other in zip(rows, others, strict=True)]
    write_records(tmp_path / "wrong.jsonl", wrong)
    run(tmp_path, "--data_path", "wrong.jsonl,human.jsonl", "--references", "references.jsonl")
    wrong, human = measures(tmp_path, "wrong"), measures(tmp_path, "human")
    assert human["chair_i"] < 0.1 < 0.7 < wrong["chair_i"]
    assert human["f1"] > 0.4 > 0.1 > wrong["f1"]
    assert human["words"] == wrong["words"]
