"""Annotation against a real server on loopback: what is asked, what is kept, and what no failure may write."""

import base64
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava import endpoint
from llava.endpoint import Endpoint, ServiceDown, data_url
from llava.errors import UserError
from llava.prompts import COD_HEADINGS, check_steps
from llava.records import read_jsonl, read_records
from llava.toy import annotator
from training_data_annotation import annotate_captions

GOOD = "\n\n".join(f"{heading}\nText {number}." for number, heading in enumerate(COD_HEADINGS, 1))
QUICK = {"retry-after-ms": "1"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toy(world, tmp_path) -> Path:
    """A copy of the toy world's captioned part, free to be damaged."""
    folder = tmp_path / "toy"
    shutil.copytree(world / "images" / "captioned", folder / "images" / "captioned")
    for name in ("captioned.json", "truth.jsonl"):
        shutil.copy(world / name, folder)
    return folder


class Server:
    """The toy annotator over HTTP; counts requests and answers as `script` says where it says something.

    `script` gets the number of the request (from 0) and its body, and returns (status, value, headers), or None for
    the toy annotator's own answer. `value` is JSON, or bytes to send as they are.
    """

    def __init__(self, folder: Path):
        self.script: Callable[[int, dict], tuple | None] = lambda number, body: None
        self.requests: list[dict] = []
        self.mutex = threading.Lock()
        self.http = annotator.serve(folder)
        self.http.RequestHandlerClass = type("CountingHandler", (self.http.RequestHandlerClass,), {"owner": self})
        self.http.RequestHandlerClass.do_POST = self.make_do_post(self.http.RequestHandlerClass.do_POST)
        self.base_url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def make_do_post(self, answer: Callable) -> Callable:
        def do_post(handler) -> None:
            data = handler.rfile.read(int(handler.headers["Content-Length"]))
            with self.mutex:
                number = len(self.requests)
                self.requests.append({"path": handler.path, **json.loads(data)})
            scripted = self.script(number, self.requests[number])
            if scripted is None:
                handler.rfile = Replay(data)
                answer(handler)
                handler.close_connection = True
                return
            status, value, headers = scripted
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            handler.send_response(status)
            for name, text in {"Content-Type": "application/json", **headers}.items():
                handler.send_header(name, text)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return do_post

    @property
    def sent_images(self) -> list[str]:
        """The data URL of every request."""
        return [request["messages"][-1]["content"][1]["image_url"]["url"] for request in self.requests]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Replay:
    """The request's body once more, for the handler that reads it."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self, size: int) -> bytes:
        return self.data[:size]

    def close(self) -> None:
        pass


@pytest.fixture
def server(toy):
    started = Server(toy)
    yield started
    started.close()


@pytest.fixture
def run(monkeypatch, toy, tmp_path, server):
    """Run the command; returns its output folder."""

    def call(*more: str) -> Path:
        output = tmp_path / "out"
        command = ["annotate", "--data_path", toy / "captioned.json", "--output_cod_dir", output / "cod"]
        command += ["--output_dd_dir", output / "dd", "--base_url", server.base_url, *more]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        annotate_captions.main()
        return output

    return call


def captioned(folder: Path) -> list[dict]:
    return json.loads((folder / "captioned.json").read_text())


def keep(folder: Path, count: int) -> list[dict]:
    """Shorten the captioned file of a world to its first records."""
    records = captioned(folder)[:count]
    (folder / "captioned.json").write_text(json.dumps(records))
    return records


def completion(text, finish: str = "stop", **fields) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice], "usage": usage}
    return {**whole, **fields}


def rejected(output: Path) -> dict[str, str]:
    """id -> reason."""
    return {row["id"]: row["reason"] for row in read_jsonl(output / "cod" / "cod.rejected.jsonl")}


def status(output: Path) -> str:
    return json.loads((output / "cod" / "run.json").read_text())["status"]


# The records that come out


def test_the_toy_world_is_annotated_and_incomplete_answers_are_rejected(run, toy, server):
    output = run("--model", "toy-model")
    scenes, records = annotator.load_truth(toy), captioned(toy)
    digests = {row["id"]: hashlib.sha256((toy / row["image"]).read_bytes()).hexdigest() for row in records}
    incomplete = {row for row, digest in digests.items() if "Step 5" not in annotator.answer(digest, scenes[digest])}
    cod = list(read_records(output / "cod" / "cod.jsonl"))
    dd = list(read_records(output / "dd" / "dd.jsonl"))
    assert incomplete
    assert set(rejected(output)) == incomplete
    assert [row["id"] for row in cod] == [f"{row['id']}-cod" for row in records if row["id"] not in incomplete]
    assert [row["id"] for row in dd] == [f"{row['id']}-dd" for row in records if row["id"] not in incomplete]
    by_id = {row["id"]: row for row in records}
    for long, direct in zip(cod, dd, strict=True):
        source = by_id[long["lineage"]["source"]]
        question, description = (turn["value"] for turn in source["conversations"])
        assert long["image"] == direct["image"] == source["image"]
        assert long["conversations"][0] == {"from": "human", "value": question + " Describe the image step-by-step."}
        assert direct["conversations"][0] == {"from": "human", "value": question}
        steps = check_steps(long["conversations"][1]["value"], 5)
        assert steps[4] == description  # the world's own description is what its annotator says in step 5
        assert direct["conversations"][1] == {"from": "gpt", "value": description}
        assert [line for line in long["conversations"][1]["value"].split("\n") if line in COD_HEADINGS] == list(
            COD_HEADINGS
        )
        assert long["lineage"]["model"] == "toy-model"
    reasons = set(rejected(output).values())
    assert reasons == {"answer without the five steps: step 5 of 5 is missing"}
    assert all("Step 4" in row["reply"] for row in read_jsonl(output / "cod" / "cod.rejected.jsonl"))
    state = json.loads((output / "cod" / "run.json").read_text())
    assert state["status"] == "complete"
    assert {name: state["counts"][name] for name in ("in", "out", "rejected")} == {
        "in": len(records), "out": len(cod), "rejected": len(incomplete),
    }  # fmt: skip
    assert len(server.requests) == len(records) + len(incomplete)  # an incomplete answer is asked for once more


def test_bold_headings_are_accepted_and_written_plain(run, toy, server):
    keep(toy, 1)
    bold = GOOD
    for heading in COD_HEADINGS:
        bold = bold.replace(heading, f"**{heading}**")
    server.script = lambda number, body: (200, completion(bold), {})
    [record] = read_records(run() / "cod" / "cod.jsonl")
    assert record["conversations"][1]["value"] == GOOD


def test_the_request_carries_prompt_question_hint_image_and_settings(run, toy, server):
    [record] = keep(toy, 1)
    run("--model", "m", "--temperature", "0.5", "--max_tokens", "77")
    [request] = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.5, 77)
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(heading in system["content"] for heading in COD_HEADINGS)
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    assert user["content"][0]["text"] == f"Question: {question}\n\nExisting description: {record['caption']}"
    image = base64.b64encode((toy / record["image"]).read_bytes()).decode()
    assert server.sent_images == [f"data:image/png;base64,{image}"]


def test_without_a_caption_field_the_answer_is_the_hint(run, toy, server):
    [record] = keep(toy, 1)
    del record["caption"]
    (toy / "captioned.json").write_text(json.dumps([record]))
    run()
    text = server.requests[0]["messages"][1]["content"][0]["text"]
    assert text.endswith(f"Existing description: {record['conversations'][1]['value']}")


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_the_data_url_tells_the_true_type_whatever_the_name(tmp_path, kind, mime):
    path = tmp_path / "named.jpg"
    Image.new("RGB", (8, 8), "red").save(path, kind)
    assert data_url(path) == f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


# Resuming


def test_a_complete_run_asks_nothing_again(run, toy, server, capsys):
    keep(toy, 3)
    output = run()
    asked, written = len(server.requests), (output / "cod" / "cod.jsonl").read_bytes()
    run()
    assert "already complete" in capsys.readouterr().out
    assert len(server.requests) == asked
    assert (output / "cod" / "cod.jsonl").read_bytes() == written


def test_a_stopped_run_asks_only_for_what_it_has_not(run, toy, server):
    records = keep(toy, 5)
    server.script = lambda number, body: (401, {"error": {"message": "no credit"}}, {}) if number >= 3 else (
        200, completion(GOOD), {},
    )  # fmt: skip
    with pytest.raises(ServiceDown, match="no credit"):
        run("--concurrency", "1")
    server.requests.clear()
    server.script = lambda number, body: (200, completion(GOOD), {})
    output = run("--concurrency", "1")
    assert len(server.requests) == 2
    assert status(output) == "complete"
    expected = [f"{record['id']}-cod" for record in records]
    assert [record["id"] for record in read_records(output / "cod" / "cod.jsonl")] == expected


def test_a_torn_reply_is_asked_for_again_and_no_other(run, toy, server):
    keep(toy, 3)
    server.script = lambda number, body: (200, completion(GOOD), {})
    output = run("--concurrency", "1")
    replies = output / "cod" / "replies.jsonl"
    replies.write_bytes(replies.read_bytes()[:-9])
    state = json.loads((output / "cod" / "run.json").read_text())
    (output / "cod" / "run.json").write_text(json.dumps({**state, "status": "running"}))
    whole = (output / "cod" / "cod.jsonl").read_bytes()
    (output / "cod" / "cod.jsonl").unlink()
    server.requests.clear()
    run("--concurrency", "1")
    assert len(server.requests) == 1
    assert (output / "cod" / "cod.jsonl").read_bytes() == whole


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_asked(run, toy, server):
    keep(toy, 1)
    run()
    server.requests.clear()
    with pytest.raises(UserError, match=r"temperature was 0\.2, now 0\.9"):
        run("--temperature", "0.9")
    assert server.requests == []


# A server in trouble


@pytest.mark.parametrize("trouble", [500, 503, 408, 429])
def test_trouble_that_passes_costs_no_record(run, toy, server, trouble):
    keep(toy, 1)
    error = {"error": {"message": "try later"}}
    server.script = lambda number, body: (trouble, error, QUICK) if number < 2 else (200, completion(GOOD), {})
    assert len(list(read_records(run() / "cod" / "cod.jsonl"))) == 1
    assert len(server.requests) == 3


def test_too_many_requests_with_retry_after_zero_is_retried_soon(run, toy, server):
    keep(toy, 1)
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
    server.script = lambda number, body: busy if number == 0 else (200, completion(GOOD), {})
    began = time.monotonic()
    assert len(list(read_records(run() / "cod" / "cod.jsonl"))) == 1
    assert time.monotonic() - began < 3
    assert len(server.requests) == 2


def test_trouble_that_stays_stops_the_run_and_says_to_come_back(run, toy, server, monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 1)
    keep(toy, 3)
    server.script = lambda number, body: (500, {"error": {"message": "down"}}, QUICK)
    with pytest.raises(ServiceDown, match=r"does not answer after 1 retries.*run the same command again later"):
        run("--concurrency", "1")
    assert len(server.requests) == 2
    assert status(tmp_path / "out") == "failed"
    assert not (tmp_path / "out" / "cod" / "cod.jsonl").exists()


def test_nobody_listening_stops_the_run(run, server, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 0)
    server.close()
    with pytest.raises(ServiceDown, match="does not answer"):
        run()


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refused_key_or_model_stops_the_run_and_keeps_what_was_done(run, toy, server, tmp_path, code):
    keep(toy, 6)
    server.script = lambda number, body: (
        (200, completion(GOOD), {}) if number < 2 else (code, {"error": {"message": "bad key"}}, {})
    )
    with pytest.raises(ServiceDown, match=r"bad key.*Fix: check key, model and endpoint"):
        run("--concurrency", "1")
    assert len(server.requests) == 3
    assert len(list(read_jsonl(tmp_path / "out" / "cod" / "replies.jsonl"))) == 2
    assert status(tmp_path / "out") == "failed"
    assert not (tmp_path / "out" / "cod" / "cod.jsonl").exists()


def test_answers_under_way_when_the_run_stops_are_kept(run, toy, server, tmp_path):
    keep(toy, 4)
    refused = threading.Event()

    def script(number, body):
        if number == 3:
            refused.set()
            return 401, {"error": {"message": "bad key"}}, {}
        assert refused.wait(10)
        time.sleep(0.2)  # the refusal reaches the client first
        return 200, completion(GOOD), {}

    server.script = script
    with pytest.raises(ServiceDown):
        run("--concurrency", "4")
    assert len(server.requests) == 4
    assert len(list(read_jsonl(tmp_path / "out" / "cod" / "replies.jsonl"))) == 3


# Answers that are none


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b"<html><body>Sign in to the hotel network</body></html>", {"Content-Type": "text/html"}),
        (b"<html><body>Sign in</body></html>", {}),
        (b'{"choices": [{"mess', {}),
        (b"", {}),
        (b"\xff\xfe{}", {}),
        ({}, {}),
        ([], {}),
        (completion(GOOD, choices=[]), {}),
        (completion(GOOD, choices=None), {}),
        (completion(GOOD, choices=[{"index": 0, "finish_reason": "stop"}]), {}),
        (completion(None), {}),
        (completion(""), {}),
        (completion(" \n"), {}),
        (completion(7), {}),
        (completion([{"type": "text", "text": GOOD}]), {}),
        (completion(GOOD, finish="length"), {}),
        (completion(GOOD, finish="content_filter"), {}),
        (completion("I cannot help with that."), {}),
        (completion(GOOD[: GOOD.index("Step 3")]), {}),
    ],
)
def test_no_bad_answer_becomes_a_record_and_the_others_go_on(run, toy, server, value, headers):
    records = keep(toy, 3)
    bad = base64.b64encode((toy / records[1]["image"]).read_bytes()).decode()

    def script(number, body):
        is_bad = body["messages"][-1]["content"][1]["image_url"]["url"].endswith(bad)
        return (200, value, headers) if is_bad else (200, completion(GOOD), {})

    server.script = script
    output = run("--concurrency", "1")
    good = [f"{records[0]['id']}-cod", f"{records[2]['id']}-cod"]
    assert [record["id"] for record in read_records(output / "cod" / "cod.jsonl")] == good
    assert len(list(read_records(output / "dd" / "dd.jsonl"))) == 2
    assert list(rejected(output)) == [records[1]["id"]]
    assert rejected(output)[records[1]["id"]].startswith(("no usable answer: ", "answer without the five steps: "))
    assert status(output) == "complete"
    assert len(server.requests) <= 2 + annotate_captions.ATTEMPTS


def test_a_second_attempt_may_succeed(run, toy, server):
    keep(toy, 1)
    server.script = lambda number, body: (200, completion(GOOD if number else GOOD[:50]), {})
    output = run()
    assert len(list(read_records(output / "cod" / "cod.jsonl"))) == 1
    assert rejected(output) == {}


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_is_refused_costs_one_record_only(run, toy, server, code):
    records = keep(toy, 2)
    first = base64.b64encode((toy / records[0]["image"]).read_bytes()).decode()

    def script(number, body):
        if body["messages"][-1]["content"][1]["image_url"]["url"].endswith(first):
            return code, {"error": {"message": "this image is not for me"}}, {}
        return 200, completion(GOOD), {}

    server.script = script
    output = run("--concurrency", "1")
    assert "this image is not for me" in rejected(output)[records[0]["id"]]
    assert len(list(read_records(output / "cod" / "cod.jsonl"))) == 1


@pytest.mark.parametrize("usage", [None, {}])
def test_a_server_that_counts_no_tokens_is_good_enough(run, toy, server, usage):
    keep(toy, 1)
    server.script = lambda number, body: (200, completion(GOOD, usage=usage), {})
    [record] = read_records(run() / "cod" / "cod.jsonl")
    assert record["lineage"]["prompt_tokens"] == 0


# Rows that cannot be asked about


def test_rows_without_one_readable_image_are_rejected_and_never_sent(run, toy, server):
    records = captioned(toy)[:6]
    absent, empty, web_page, cut, two, good = records
    absent["image"] = "images/absent.png"
    (toy / empty["image"]).write_bytes(b"")
    (toy / web_page["image"]).write_text("<html>404</html>")
    data = (toy / cut["image"]).read_bytes()
    (toy / cut["image"]).write_bytes(data[: len(data) // 2])
    two["image"] = [good["image"], good["image"]]
    (toy / "captioned.json").write_text(json.dumps(records))
    server.script = lambda number, body: (200, completion(GOOD), {})
    output = run()
    assert [record["id"] for record in read_records(output / "cod" / "cod.jsonl")] == [f"{good['id']}-cod"]
    reasons = rejected(output)
    assert set(reasons) == {record["id"] for record in (absent, empty, web_page, cut, two)}
    assert "absent.png" in reasons[absent["id"]]
    assert empty["image"] in reasons[empty["id"]]
    assert reasons[two["id"]] == "has 2 images; annotation wants one"
    assert len(server.requests) == 1


def test_a_truncated_jpeg_is_rejected_like_everywhere_else_and_never_sent(run, toy, server):
    record, _ = keep(toy, 2)
    path = toy / record["image"]
    Image.open(path).resize((256, 256)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    server.script = lambda number, body: (200, completion(GOOD), {})
    output = run()
    assert record["image"] in rejected(output)[record["id"]]
    assert len(server.requests) == 1


# Before anything is asked


def test_a_dry_run_asks_and_writes_nothing_and_finds_missing_images(run, toy, server, tmp_path, capsys):
    run("--dry_run")
    assert f"records      {len(captioned(toy))}, every image found" in capsys.readouterr().out
    (toy / captioned(toy)[3]["image"]).unlink()
    with pytest.raises(UserError, match=r"images/captioned/\S+ cannot be opened"):
        run("--dry_run")
    assert server.requests == []
    assert not (tmp_path / "out").exists()


def test_limit_takes_the_first_records(run, toy, server):
    server.script = lambda number, body: (200, completion(GOOD), {})
    output = run("--limit", "2")
    expected = [f"{record['id']}-cod" for record in captioned(toy)[:2]]
    assert [record["id"] for record in read_records(output / "cod" / "cod.jsonl")] == expected


def test_no_records_is_an_error(run, toy):
    (toy / "captioned.json").write_text("[]")
    with pytest.raises(UserError, match="holds no records"):
        run()


def test_a_key_is_needed_unless_the_server_is_on_this_machine():
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        Endpoint("https://annotator.example/v1", "m")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        Endpoint(None, "m")
    Endpoint("http://localhost:1/v1", "m")


# Money and pace


def test_the_cost_is_counted_and_a_budget_stops_the_run_and_pays_for_nothing_twice(run, toy, server, tmp_path, capsys):
    keep(toy, 6)
    server.script = lambda number, body: (200, completion(GOOD), {})
    prices = ("--price_input", "100000", "--price_output", "200000", "--concurrency", "1")  # 1 + 1 a request
    with pytest.raises(UserError, match=r"budget is used up: 6\.00 of 5\.00.*raise MAX_COST"):
        run(*prices, "--max_cost", "5")
    assert len(server.requests) == 3
    output = run(*prices, "--max_cost", "100")
    assert len(server.requests) == 6
    assert "60 tokens in, 30 out, cost 12.00" in capsys.readouterr().out
    state = json.loads((output / "cod" / "run.json").read_text())
    assert state["cost"] == 12.0
    assert (state["counts"]["tokens_in"], state["counts"]["tokens_out"]) == (60, 30)


def test_a_budget_without_prices_is_refused(run):
    with pytest.raises(UserError, match="set PRICE_INPUT and PRICE_OUTPUT"):
        run("--max_cost", "5")


def test_requests_are_paced(run, toy, server):
    keep(toy, 4)
    server.script = lambda number, body: (200, completion(GOOD), {})
    began = time.monotonic()
    run("--requests_per_minute", "300", "--concurrency", "4")
    assert time.monotonic() - began >= 3 * 0.2


def test_the_published_wording_is_one_flag_away(run, toy, server):
    keep(toy, 1)
    server.script = lambda number, body: (200, completion(GOOD), {})
    [record] = read_records(run("--published_wording") / "cod" / "cod.jsonl")
    assert record["conversations"][0]["value"].endswith(" Describe the image step by step.")
