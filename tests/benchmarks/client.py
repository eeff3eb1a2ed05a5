"""Requests a second of the chat-completions client, against two threads of a blocking one; a server with 200 ms latency.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.client

The server runs in a process of its own; every request must be answered exactly once.
"""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

from llava.endpoint import Endpoint, each
from tests.loopback import Loopback, completion

LATENCY, IMAGE = 0.2, "data:image/png;base64," + "A" * 4000
CONCURRENCY = 384


def serve(pipe) -> None:
    def answer(number: int, body: dict) -> tuple:
        return 200, completion([body["messages"][0]["content"][0]["text"]]), {}

    with Loopback(answer, LATENCY) as server:
        pipe.send(server.base_url)
        pipe.recv()


def messages(number: int) -> list[dict]:
    content = [{"type": "text", "text": f"request {number}"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
    return [{"role": "user", "content": content}]


def bench_client(few: int = 40, many: int = 4000) -> float:
    """Ratio of the requests a second."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    url = ours.recv()
    import openai

    blocking = openai.OpenAI(base_url=url, api_key="none")

    def one(number: int) -> str:
        return blocking.chat.completions.create(model="m", messages=messages(number)).choices[0].message.content

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(one, range(few)))
    slow = few / (time.perf_counter() - start)
    assert texts == [f"request {number}" for number in range(few)]

    endpoint, answers = Endpoint(url, "m"), {}
    start, busy = time.perf_counter(), time.process_time()
    each(
        range(many), lambda number: endpoint.ask(messages(number)),
        lambda number, replies: answers.setdefault(number, []).append(replies[0].text), CONCURRENCY,
    )  # fmt: skip
    fast = many / (time.perf_counter() - start)
    busy = (time.process_time() - busy) / many
    assert answers == {number: [f"request {number}"] for number in range(many)}
    ours.send("done")
    print(
        f"requests a second at {LATENCY * 1e3:.0f} ms: two threads {slow:.1f}, ours {fast:.0f} ({CONCURRENCY} in flight, "
        f"{busy * 1e3:.1f} ms of CPU a request)  {fast / slow:.1f}x, all answered once"
    )
    return fast / slow


if __name__ == "__main__":
    bench_client()
