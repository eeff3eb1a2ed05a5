"""Talk to a checkpoint about images, in the terminal or on a web page.

    python -m llava.chat --checkpoint runs/quickstart/sicog --image photo.jpg
    python -m llava.chat --checkpoint runs/quickstart/sicog --image photo.jpg --question "What is in the photo?"
    python -m llava.chat --checkpoint runs/quickstart/sicog --serve

In the terminal `/image FILE` adds an image to the next message, `/clear` starts over, `/quit` leaves. The page needs
the extra `demo` (`bash training_scripts/setup.sh demo`).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from llava.errors import UserError, run_command


class Conversation:
    """Messages and images so far, and the model that answers. Every turn reads the whole conversation again."""

    def __init__(self, model, processor, temperature: float, max_new_tokens: int):
        self.model, self.processor = model, processor
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.clear()

    def clear(self) -> None:
        self.messages, self.images = [], []

    def add(self, role: str, text: str, images: list = ()) -> None:
        """Append a turn; each image stands on a line of its own before the text."""
        self.images += images
        self.messages.append({"role": role, "content": "<image>\n" * len(images) + text})

    def ask(self, text: str, images: list = ()) -> Iterator[str]:
        """Add a question and yield its answer piece by piece; the whole answer becomes the next turn."""
        self.add("user", text, images)
        answer = ""
        for piece in self.answer():
            answer += piece
            yield piece
        self.add("assistant", answer)

    def answer(self) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        processor = self.processor
        inputs = processor(images=self.images or None, text=processor.prompt(self.messages)).to(self.model.device)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        failure = []

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs, **settings, max_new_tokens=self.max_new_tokens, streamer=streamer,
                    suppress_tokens=[processor.image_token_id],
                )  # fmt: skip
            except BaseException as error:  # handed to the thread that reads
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failure:
            raise failure[0]


def open_conversation(checkpoint: str, temperature: float, max_new_tokens: int) -> Conversation:
    """Load the checkpoint on the GPU where there is one. Raises UserError when it is none."""
    from llava.model.load import open_to_ask

    return Conversation(*open_to_ask(checkpoint), temperature, max_new_tokens)


def terminal(conversation: Conversation, images: list) -> None:
    """Read messages from the keyboard until the end of input."""
    print("/image FILE adds an image, /clear starts over, /quit leaves")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/clear":
            conversation.clear()
            images = []
        elif line.startswith("/image"):
            try:
                images = [*images, load(line.removeprefix("/image").strip())]
            except UserError as error:
                print(f"error: {error}")
            else:
                width, height = images[-1].size
                print(f"{width}x{height} pixels, {len(conversation.processor.image_ids(width, height))} tokens")
        elif line.startswith("/"):
            print("unknown command; there are /image FILE, /clear and /quit")
        elif line:
            say(conversation.ask(line, images))
            images = []


def say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def load(path: str):
    from llava.images import find_image, load_image

    return load_image(find_image(Path(path).parent, Path(path).name))


def page(conversation: Conversation, title: str):
    """The web page: a chat with an image upload. Every visitor has a conversation of their own."""
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"--serve needs gradio ({error}). Fix: run `bash training_scripts/setup.sh demo`") from error

    def respond(message: dict, history: list[dict]) -> Iterator[str]:
        own = Conversation(
            conversation.model, conversation.processor, conversation.temperature, conversation.max_new_tokens
        )
        waiting = []  # images of turns that had no text
        for turn in [
            *history,
            {"role": "user", "content": [*({"path": path} for path in message["files"]), message["text"]]},
        ]:
            text, paths = text_and_files(turn["content"])
            waiting += [load(path) for path in paths]
            if text:
                own.add(turn["role"], text, waiting)
                waiting = []
        if waiting:
            own.add("user", "", waiting)
        answer = ""
        for piece in own.answer():
            answer += piece
            yield answer

    return gradio.ChatInterface(
        respond,
        multimodal=True,
        title=title,
        textbox=gradio.MultimodalTextbox(file_types=["image"], placeholder="Add an image and ask about it"),
        flagging_mode="never",
        analytics_enabled=False,
    )


def text_and_files(content) -> tuple[str, list[str]]:
    """Text and file paths of a turn as gradio gives it: a string, or a list of strings, `path` and typed parts."""
    texts, paths = [], []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif "text" in part:
            texts.append(part["text"])
        else:
            paths.append(part.get("path") or part["file"]["path"])
    return "\n".join(filter(None, texts)), paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder")
    parser.add_argument("--image", action="append", default=[], help="image of the first message; may be repeated")
    parser.add_argument("--question", help="answer this one question and leave")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="(default: 512)")
    parser.add_argument("--serve", action="store_true", help="a web page instead of the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="of the page; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: 7860)")
    arguments = parser.parse_args()
    images = [load(path) for path in arguments.image]
    conversation = open_conversation(arguments.checkpoint, arguments.temperature, arguments.max_new_tokens)
    if arguments.serve:
        title = f"{Path(arguments.checkpoint).name}: ask about an image"
        page(conversation, title).launch(server_name=arguments.host, server_port=arguments.port, quiet=True)
    elif arguments.question:
        say(conversation.ask(arguments.question, images))
    else:
        terminal(conversation, images)


if __name__ == "__main__":
    run_command(main)
