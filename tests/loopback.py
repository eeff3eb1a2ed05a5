"""A chat-completions server on loopback whose every answer is scripted; hundreds of requests wait in it at a time."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any


def completion(texts: list[str], finish: str = "stop") -> dict[str, Any]:
    choices = [
        {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for number, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "toy", "choices": choices, "usage": usage}


class Loopback:
    """Args: answer gives (status, value or bytes, headers) for the number of a request and its body; None drops the
    connection. `latency` in seconds. Attributes: `requests`, `most` in flight at once.
    """

    def __init__(self, answer: Callable[[int, dict], tuple | None], latency: float = 0.0):
        self.answer, self.latency = answer, latency
        self.requests: list[dict] = []
        self.flying = self.most = 0
        self.loop = asyncio.new_event_loop()
        self.server = None
        started = threading.Event()

        async def start() -> None:
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=1024, limit=1 << 24)
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.create_task(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        started.wait(10)
        self.base_url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
                body = json.loads(await reader.readexactly(int(lengths[0].split(b":")[1])))
                number = len(self.requests)
                self.requests.append(body)
                self.flying += 1
                self.most = max(self.most, self.flying)
                await asyncio.sleep(self.latency)
                self.flying -= 1
                answered = self.answer(number, body)
                if answered is None:
                    break
                status, value, headers = answered
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                lines = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
                writer.write(f"HTTP/1.1 {status} X\r\n".encode())
                writer.write("".join(f"{name}: {text}\r\n" for name, text in lines.items()).encode() + b"\r\n" + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        def stop() -> None:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.server.close()
            self.loop.call_later(0.05, self.loop.stop)

        self.loop.call_soon_threadsafe(stop)
        self.thread.join(5)

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
