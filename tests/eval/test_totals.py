"""Totals, intervals and paired tests, by hand and against simple loops."""

import math
import random

import numpy as np
import pytest

from llava.eval.cider import cider
from llava.eval.totals import TOTALS, Units, compare, interval, share, wilson


def scored(scores: list[float], **more) -> list[dict]:
    return [
        {"index": str(number), "score": score, "extracted": "", "answer": "", **{key: values[number] for key, values in more.items()}}
        for number, score in enumerate(scores)
    ]  # fmt: skip


def test_a_mean_is_in_per_cent_and_by_category():
    units = TOTALS["mean"](scored([1, 0.5, 0, 0], category=["a", "a", "b", ""]))
    assert units.number() == 37.5
    assert units.details == {"a": 75.0, "b": 0.0}


def test_a_rotated_question_counts_when_every_rotation_is_right():
    rows = scored([1, 1, 1, 0, 1])
    for item, index in zip(rows, ["1", "1000001", "2", "1000002", "1000003"], strict=True):
        item["index"] = index
    units = TOTALS["circular"](rows)
    assert units.number() == 50  # question 1 both, question 2 one of two, question 3 has no first rotation
    assert units.names == ["1", "2"]
    assert units.details["every rotation by itself"] == 80


def test_f1_by_hand():
    rows = scored([1, 0, 0, 1, 0])
    for item, (answer, said) in zip(
        rows, [("Yes", "Yes"), ("No", "Yes"), ("Yes", "No"), ("No", "No"), ("Yes", "")], strict=True
    ):
        item.update(answer=answer, extracted=said)
    units = TOTALS["f1"](rows)  # hits 1, false 1, missed 2: precision 1/2, recall 1/3
    assert units.number() == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert units.details == pytest.approx({"accuracy": 40, "precision": 50, "recall": 100 / 3})


def test_mme_by_hand():
    rows = scored(
        [1, 1, 1, 0, 0, 1], category=["OCR"] * 4 + ["text_translation"] * 2, image_path=["a", "a", "b", "b", "c", "c"]
    )
    units = TOTALS["mme"](rows)
    assert units.number() == 75 + 50  # 3 of 4 questions, 1 of 2 images
    assert units.details == {"reasoning": 50.0, "OCR": 125.0, "text_translation": 50.0}
    assert len(units.names) == 3


def test_ocrbench_counts_tenths():
    units = TOTALS["ocrbench"](scored([1, 0, 1], category=["Digit String Recognition", "x", "Doc-oriented VQA"]))
    assert units.number() == 0.2
    assert units.details == {"Text Recognition": 1, "x": 0, "Doc-oriented VQA": 1}


def test_cider_agrees_with_pycocoevalcap():
    # pycocoevalcap 1.2 gives [4.81531719, 1.25, 5.0] for these
    captions = ["a dog sits on a mat", "two dogs", "a tree"]
    references = [["a red dog sits", "the dog sits on a mat"], ["two cats"], ["a tree"]]
    assert cider(captions, references) == pytest.approx([4.815317186972989, 1.25, 5.0])
    rows = scored([0] * 3)
    for item, caption, texts in zip(rows, captions, references, strict=True):
        item.update(extracted=caption, answer=str(texts))
    assert TOTALS["cider"](rows).number() == pytest.approx(100 * (4.815317186972989 + 1.25 + 5) / 3)


def test_the_wilson_interval_by_hand():
    # n = 10, p = 0.8, z = 1.96: middle (0.8 + 0.192) / 1.384 = 0.7167; half width 0.3138 / 1.384 = 0.2267
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(TOTALS["mean"](scored([1] * 8 + [0] * 2))) == pytest.approx((49.02, 94.33), abs=1e-2)


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval():
    rng = random.Random(0)
    scores = [rng.choice([0, 0.3, 1.0]) for _ in range(400)]
    low, high = interval(TOTALS["mean"](scored(scores)))
    error = 100 * np.std(scores) / math.sqrt(len(scores))
    middle = 100 * np.mean(scores)
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.5)


def test_equal_models_do_not_differ_and_better_ones_do():
    first, second = TOTALS["mean"](scored([1, 0] * 50)), TOTALS["mean"](scored([1, 0] * 40 + [1, 1] * 10))
    assert compare(first, first) == (0, (0, 0), 1)
    value, (low, high), p = compare(first, second)
    assert value == 10
    assert 0 < low < 10 < high
    # ten questions differ, all in one direction: of 2**10 exchanges two are as far apart
    assert p == pytest.approx(2 / 1024, abs=0.0015)
    back, (under, over), same = compare(second, first)
    assert (back, under, over, same) == (-value, -high, -low, p)


def test_the_permutation_test_of_f1_is_that_of_a_plain_loop():
    rng = random.Random(1)

    def model(right: float) -> Units:
        rows = scored([0] * 60)
        for number, item in enumerate(rows):
            truth = "Yes" if number % 2 else "No"
            said = truth if rng.random() < right else "Yes"
            item.update(answer=truth, extracted=said, score=float(said == truth))
        return TOTALS["f1"](rows)

    first, second = model(0.6), model(0.8)
    value, _, p = compare(first, second)
    extreme, rounds = 0, 3000
    for _ in range(rounds):
        one, other = first.counts.copy(), second.counts.copy()
        for unit in range(60):
            if rng.random() < 0.5:
                one[unit], other[unit] = second.counts[unit], first.counts[unit]
        extreme += abs(float(first.value(other.sum(0)) - first.value(one.sum(0)))) >= abs(value) - 1e-9
    assert p == pytest.approx(extreme / rounds, abs=0.03)


def test_units_are_put_in_another_order():
    units = Units(["a", "b"], np.array([[1.0, 1], [0, 1]]), share, {})
    assert units.in_order(["b", "a"]).counts[:, 0].tolist() == [0, 1]
