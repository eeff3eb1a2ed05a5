"""The embedded sentence encoder, and how others are named."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from llava.errors import UserError
from quality_evaluation.encoder import HashingEncoder, open_encoder


def cosine(one: str, two: str) -> float:
    first, second = HashingEncoder().encode([one, two])
    return float(first @ second)


def test_rows_are_unit_vectors_and_an_empty_text_is_a_zero_row():
    vectors = HashingEncoder().encode(["A red circle.", "", "...", "x"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0, 1], abs=1e-6)
    assert HashingEncoder().encode([]).shape == (0, vectors.shape[1])


def test_case_and_punctuation_do_not_count_but_order_does():
    assert cosine("A red circle!", "a RED, circle") == pytest.approx(1)
    assert 0.2 < cosine("the cat sees the dog", "the dog sees the cat") < 0.99


def test_a_word_a_pair_and_a_triple_count_by_hand():
    # "one two three": 3 words, 2 pairs, 1 triple = 6 grams; "one two four" shares one, two, one two = 3 of 6
    assert cosine("one two three", "one two four") == pytest.approx(3 / 6, abs=1e-6)
    # "one": 1 gram of weight 1; "one one": the word twice (1 + ln 2) and one pair
    weight = 1 + np.log(2)
    assert cosine("one", "one one") == pytest.approx(weight / np.hypot(weight, 1), abs=1e-6)


def test_closer_texts_score_higher():
    text = "A large red circle is at the top left. The background is black."
    near = "A large red circle is at the top right. The background is black."
    far = "Two dogs play with a ball near the sea."
    assert cosine(text, near) > 0.6 > 0.2 > cosine(text, far)


def test_vectors_are_the_same_in_another_process():
    text = "A red circle is at the top."
    code = (
        "from quality_evaluation.encoder import HashingEncoder;"
        f"print(HashingEncoder().encode([{text!r}])[0].nonzero()[0].tolist())"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "77"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert output.strip() == str(HashingEncoder().encode([text])[0].nonzero()[0].tolist())


def test_an_unknown_encoder_is_refused_by_name():
    assert open_encoder("hashing").name == "hashing"
    with pytest.raises(UserError, match="'/model_weight/NV-Embed-v2' is neither `hashing` nor a folder"):
        open_encoder("/model_weight/NV-Embed-v2")


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="the extra is installed")
def test_a_folder_needs_the_extra(tmp_path):
    with pytest.raises(UserError, match=r"needs the extra `embed`"):
        open_encoder(str(tmp_path))
