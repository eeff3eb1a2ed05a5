"""Talking to a checkpoint: one question, the terminal, the web page."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.chat import Conversation, text_and_files
from llava.generate.candidates import Draw, Prompt, Sampling
from llava.generate.sampling import complete

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def conversation(model, processor):
    return Conversation(model, processor, temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from llava.toy.scenes import render, sample_scene

    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    render(sample_scene(5)).save(path)
    return path


def test_the_streamed_answer_is_the_greedy_one(conversation, picture):
    image = Image.open(picture).convert("RGB")
    pieces = list(conversation.ask("What is in the photo?", [image]))
    greedy = Sampling(temperature=0, max_new_tokens=12)
    prompt = Prompt([image], ["<image>\nWhat is in the photo?"], [Draw(0, 0)])
    expected = complete(conversation.model, conversation.processor, [prompt], greedy)[0][0]
    assert "".join(pieces).strip() == expected.text
    assert len(pieces) > 1  # it arrives while it is written


def test_the_next_question_sees_the_whole_conversation(conversation, picture):
    list(conversation.ask("What is in the photo?", [Image.open(picture)]))
    list(conversation.ask("What color is it?"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[0]["content"] == "<image>\nWhat is in the photo?"
    assert len(conversation.images) == 1
    conversation.clear()
    assert (conversation.messages, conversation.images) == ([], [])


def test_a_failure_while_generating_reaches_the_reader(conversation):
    conversation.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(conversation.ask("Hi"))


def test_terminal_session(checkpoint, picture):
    lines = f"/image nothing.png\n/image {picture}\nWhat is in the photo?\n/where\n/clear\nHi\n/quit\n"
    command = [sys.executable, "-m", "llava.chat", "--checkpoint", str(checkpoint), "--max_new_tokens", "8"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "image 'nothing.png' cannot be opened" in done.stdout
    assert "72x48 pixels, 31 tokens" in done.stdout
    assert "unknown command; there are /image FILE, /clear and /quit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere has no config.json"),
        (["--checkpoint", "x", "--image", "no.png"], "no.png"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "llava.chat", *arguments, "--question", "Hi"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hi", ("Hi", [])),
        (["Hi", {"path": "a.png"}], ("Hi", ["a.png"])),
        ([{"type": "text", "text": "Hi"}, {"type": "file", "file": {"path": "a.png"}}], ("Hi", ["a.png"])),
        ([{"path": "a.png"}, ""], ("", ["a.png"])),
    ],
)
def test_turns_in_every_form_gradio_gives_them(content, expected):
    assert text_and_files(content) == expected


@pytest.mark.slow
def test_the_page_answers_and_looks_like_a_chat(checkpoint, picture):
    import shutil
    import socket
    import time
    import urllib.request

    gradio_client = pytest.importorskip("gradio_client", reason="the extra `demo` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen(
        [sys.executable, "-m", "llava.chat", "--checkpoint", str(checkpoint), "--serve", "--port", str(port)]
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        client = gradio_client.Client(address, verbose=False)
        question = {"text": "What is in the photo?", "files": [gradio_client.handle_file(str(picture))]}
        first = client.predict(question, api_name="/respond")
        assert first
        assert client.predict({"text": "What color is it?", "files": []}, api_name="/respond")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("no Chromium for the picture; the page itself answered")
        artefact = ROOT / "runs" / "tests" / "chat.png"  # kept, to look at
        artefact.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
             "--window-size=900,700", f"--screenshot={artefact}", address],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        colors = Image.open(artefact).convert("L").getcolors()
        assert len(colors) > 20  # an empty page has one
    finally:
        server.terminate()
        server.wait()
