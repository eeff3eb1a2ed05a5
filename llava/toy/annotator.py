"""An annotator without a network: serves the chat-completions protocol on loopback from the toy world's ground truth.

    python -m llava.toy.annotator --world runs/quickstart/world --port_file runs/quickstart/annotator.port

It recognises an image by the hash of its bytes and answers with the five steps about what the image shows. Now and
then, decided by that hash, it writes headings in bold or leaves a step out, as real annotators do. Unknown images and
malformed requests get the errors a real server gives. Standard library only.
"""

import argparse
import base64
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llava.prompts import COD_HEADINGS, render_steps
from llava.records import read_jsonl
from llava.toy import texts
from llava.toy.scenes import Scene, Thing


def load_truth(world: str | Path) -> dict[str, Scene]:
    """Image hash -> scene."""
    truth = {}
    for row in read_jsonl(Path(world) / "truth.jsonl"):
        fields = row["scene"]
        truth[row["sha256"]] = Scene(**{**fields, "things": tuple(Thing(**thing) for thing in fields["things"])})
    return truth


def answer(digest: str, scene: Scene) -> str:
    """The five steps; 1 in 8 with bold headings, 1 in 12 with the last step missing."""
    reply = render_steps(COD_HEADINGS, texts.description_steps(scene))
    lot = int(digest[:8], 16)
    if lot % 8 == 0:
        for heading in COD_HEADINGS:
            reply = reply.replace(heading, f"**{heading}**")
    if lot % 12 == 1:
        reply = reply[: reply.index("Step 5")].rstrip()
    return reply


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions with one image as a data URL."""

    truth: dict[str, Scene]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            parts = [part for part in request["messages"][-1]["content"] if part["type"] == "image_url"]
            data = base64.b64decode(parts[0]["image_url"]["url"].split(",", 1)[1])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self.reply(400, {"error": {"message": f"malformed request: {error}"}})
            return
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.truth:
            self.reply(400, {"error": {"message": "I have never seen this image"}})
            return
        text = answer(digest, self.truth[digest])
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(text) // 4}
        self.reply(
            200,
            {
                "id": digest[:12], "object": "chat.completion", "created": 0, "model": request.get("model", "toy"),
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {**usage, "total_tokens": sum(usage.values())},
            },
        )  # fmt: skip

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Requests are not worth a line each."""


def serve(world: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """A server bound to loopback, not yet running; `server_address[1]` is its port."""
    handler = type("WorldHandler", (Handler,), {"truth": load_truth(world)})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, help="folder that llava.toy.world wrote")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--port_file", type=Path, help="the port is written here once the server listens")
    arguments = parser.parse_args()
    server = serve(arguments.world, arguments.port)
    if arguments.port_file:
        temporary = arguments.port_file.with_suffix(".tmp")
        temporary.write_text(str(server.server_address[1]))
        os.replace(temporary, arguments.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
