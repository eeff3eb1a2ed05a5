"""Generation through a chat-completions server: one that answers, and one that fails in every way."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava.endpoint import ServiceDown
from llava.errors import UserError
from llava.generate.candidates import Sampling
from llava.generate.job import Job, run_job
from llava.prompts import CAPTION_DEFAULT, COD_DEFAULT
from llava.records import read_jsonl
from tests.loopback import Loopback, completion

QUICK = {"retry-after-ms": "1"}


@pytest.fixture
def job(world, tmp_path):
    return Job(
        model="toy", data_path=str(world / "unlabelled_images.json"), output_dir=str(tmp_path / "run"),
        styles={"cod-default": 2, "default": 1}, sampling=Sampling(max_new_tokens=50), batch_size=4,
    )  # fmt: skip


def text_of(body) -> str:
    return body["messages"][0]["content"][-1]["text"]


def echo(number, body):
    """As many replies as asked for, each naming the image, the prompt and the seed."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    said = [f"{hash(url)} {text_of(body)} {body.get('seed')} {k}" for k in range(body.get("n", 1))]
    return 200, completion(said), {}


def run(job, answer, **changes):
    with Loopback(answer) as server:
        job = replace(job, endpoint=server.base_url, **changes)
        run_job(job, "generate captions")
    return list(read_jsonl(job.output)), server


def test_every_record_gets_its_candidates_in_two_requests(job):
    rows, server = run(job, echo)
    records = json.loads(Path(job.data_path).read_text())
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert len(server.requests) == 2 * len(records)  # one a style: `n` samples in one request
    for row in rows:
        assert [c["style"] for c in row["candidates"]] == ["cod-default", "cod-default", "default"]
        assert [c["sample"] for c in row["candidates"]] == [0, 1, 0]
        assert [c["instruction"] for c in row["candidates"]] == [COD_DEFAULT, COD_DEFAULT, CAPTION_DEFAULT]
        for candidate in row["candidates"]:
            assert candidate["instruction"] in candidate["text"]
            assert candidate["model"] == "toy"
            assert candidate["endpoint"] == server.base_url
            assert (candidate["round"], candidate["finish_reason"]) == (1, "stop")
            assert candidate["temperature"] == 0.7
    request = server.requests[0]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.7, 0.9, 50)


def test_a_server_that_gives_one_reply_whatever_n_is_asked_again(job):
    def single(number, body):
        return 200, completion([f"{text_of(body)} {body['seed']}"]), {}

    rows, server = run(job, single)
    for row in rows:
        seeds = [c["seed"] for c in row["candidates"]]
        assert len(set(seeds)) == 3
        assert [int(c["text"].split()[-1]) for c in row["candidates"]][1:] == seeds[1:]
    assert sum("n" in body for body in server.requests) <= job.batch_size  # it is remembered


def test_a_server_that_refuses_n_is_asked_one_by_one(job):
    def no_n(number, body):
        return (400, {"error": {"message": "n must be 1"}}, {}) if "n" in body else echo(number, body)

    rows, _ = run(job, no_n)
    assert all(len(row["candidates"]) == 3 for row in rows)


def test_trouble_of_every_kind_loses_and_doubles_nothing(job):
    def trouble(number, body):
        return {
            0: (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
            3: (500, {"error": {"message": "oops"}}, QUICK),
            5: None,
            7: (503, {"error": {"message": "busy"}}, QUICK),
            11: (408, {"error": {"message": "late"}}, QUICK),
        }.get(number, echo(number, body))

    rows, server = run(job, trouble)
    calm, _ = run(job, echo, output_dir=job.output_dir + "-calm")
    same = [[{**c, "endpoint": None} for c in row["candidates"]] for row in rows]
    assert same == [[{**c, "endpoint": None} for c in row["candidates"]] for row in calm]
    assert len(server.requests) == 2 * len(rows) + 5


@pytest.mark.parametrize(
    "bad", [b"<html>Sign in</html>", b'{"choices": [{"mess', {}, completion([]), completion(["x"], "content_filter")]
)
def test_a_malformed_answer_rejects_its_record_and_no_other(job, bad):
    records = json.loads(Path(job.data_path).read_text())
    image = base64.b64encode(Path(job.images, records[1]["image"]).read_bytes()).decode()

    def answer(number, body):
        mine = body["messages"][0]["content"][0]["image_url"]["url"].endswith(image)
        return (200, bad, {}) if mine else echo(number, body)

    rows, _ = run(job, answer)
    assert [row["id"] for row in rows] == [record["id"] for record in records if record["id"] != records[1]["id"]]
    [rejected] = read_jsonl(job.output.with_name("candidates.rejected.jsonl"))
    assert rejected["id"] == records[1]["id"]
    assert rejected["reason"].startswith("refused: ")


def test_a_refused_key_stops_and_the_same_command_goes_on(job):
    with pytest.raises(ServiceDown, match="bad key"):
        run(
            job,
            lambda number, body: (401, {"error": {"message": "bad key"}}, {}) if number >= 6 else echo(number, body),
        )
    kept = [row["id"] for row in read_jsonl(job.output.parent / "shards" / "shard-00000.jsonl")]
    assert 0 < len(kept) <= 3
    rows, server = run(job, echo)
    assert len(server.requests) == 2 * (len(rows) - len(kept))


def test_adaptive_asks_for_more_only_where_candidates_disagree(job):
    records = json.loads(Path(job.data_path).read_text())
    image = base64.b64encode(Path(job.images, records[0]["image"]).read_bytes()).decode()

    def answer(number, body):
        quarrel = body["messages"][0]["content"][0]["image_url"]["url"].endswith(image)
        return 200, completion([f"word{number} other{number}" if quarrel else "a red square"] * body.get("n", 1)), {}

    rows, _ = run(job, answer, adaptive=0.9)
    assert [len(row["candidates"]) for row in rows] == [3] + [2] * (len(rows) - 1)
    assert [c["style"] for c in rows[1]["candidates"]] == ["cod-default", "default"]  # one of each style first
    counts = json.loads((job.output.parent / "run.json").read_text())["counts"]
    assert counts["candidates_spared"] == len(rows) - 1


def test_corrupted_images_are_what_the_server_sees(job):
    seen = []

    def answer(number, body):
        seen.append(body["messages"][0]["content"][0]["image_url"]["url"])
        return echo(number, body)

    rows, _ = run(job, answer, corruptions=("mask",))
    assert {c["corruption"] for row in rows for c in row["candidates"]} == {"mask"}
    assert Image.open(io.BytesIO(base64.b64decode(seen[0].split(",")[1]))).format == "PNG"
    originals = [Path(job.images, row["image"]).read_bytes() for row in rows]
    assert base64.b64decode(seen[0].split(",")[1]) not in originals


def test_beams_are_refused(job):
    with pytest.raises(UserError, match="no beam search"):
        run(job, echo, sampling=Sampling(num_beams=2))


def test_one_refused_image_does_not_make_the_others_dear(job):
    records = json.loads(Path(job.data_path).read_text())
    image = base64.b64encode(Path(job.images, records[0]["image"]).read_bytes()).decode()

    def answer(number, body):
        if body["messages"][0]["content"][0]["image_url"]["url"].endswith(image):
            return 400, {"error": {"message": "unsafe image"}}, {}
        return echo(number, body)

    rows, server = run(job, answer, batch_size=1)
    assert len(rows) == len(records) - 1
    assert len(server.requests) <= 2 * len(rows) + 4  # `n` is still used
