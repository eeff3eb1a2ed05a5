"""Check that an exported folder says what the checkpoint says, as a stranger's program would open it.

    python -m llava.model.verify --checkpoint runs/quickstart/sicog --exported exported/sicog

A fresh process that cannot import this package loads the folder strictly and must give the same pixels, tokens and
logits; token counts announced for sizes must equal the tokens made; and a `transformers serve` process must answer a
chat-completions request with the checkpoint's own words. The server needs the extra `demo`.
"""

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from llava.errors import UserError, run_command

QUESTION = "What is in the photo?"
SIZES = ((336, 336), (337, 336), (640, 480), (480, 640), (1024, 300), (300, 1024), (48, 48), (90, 70), (1000, 1001))
# Runs in the fresh process: arguments are the exported folder, the picture, the question, the file to write.
PROBE = """
import sys
sys.modules["llava"] = None
import numpy, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, text, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
)
wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
assert not wrong, f"not a strict load: {wrong}"
question = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": text}]
batch = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**batch).logits
counts = []
for line in sys.stdin:
    width, height = map(int, line.split())
    told = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    made = processor(images=Image.new("RGB", (width, height)), text="<image>")["input_ids"]
    made = int((torch.as_tensor(made) >= 0).sum())
    counts.append((width, height, told, made))
numpy.savez(
    output, pixels=batch["pixel_values"].numpy(), ids=batch["input_ids"].numpy(), logits=logits.numpy(), counts=counts
)
"""


def picture(side: int):
    """A picture that shows something at every place, three resolutions wide."""
    from PIL import Image, ImageDraw

    image = Image.effect_noise((side * 2, side + side // 2), 40).convert("RGB")
    draw, rng = ImageDraw.Draw(image), random.Random(0)
    for _ in range(12):
        x, y, size = rng.randrange(image.width), rng.randrange(image.height), rng.randrange(side // 4, side)
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def probe(exported: Path, image: Path) -> dict:
    """What a process without this package makes of the exported folder. Raises UserError when it cannot open it."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "probe.npz"
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(exported.resolve()), str(image), QUESTION, str(result)],
            cwd=folder, input="\n".join(f"{width} {height}" for width, height in SIZES), capture_output=True, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules", "PYTHONPATH": ""},
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{exported} does not open in a fresh process: {done.stderr.strip().splitlines()[-1]}")
        return dict(np.load(result))


def check_sources(exported: Path) -> None:
    """Raise UserError unless every source file in the folder is the one this package writes: the probe runs them."""
    from llava.model.export_hf import MODEL_FOLDER, SOURCES, standalone

    known = {f"{Path(name).name}.py": MODEL_FOLDER / f"{name}.py" for name in SOURCES}
    for file in exported.glob("*.py"):
        if file.name not in known or file.read_text() != standalone(known[file.name].read_text()):
            raise UserError(f"{file} is not the file this package exports, and is not run. Fix: export again")


def own_view(checkpoint: Path, image) -> dict:
    """What the checkpoint itself makes of the image: pixels, token ids, logits, greedy answer."""
    import torch

    from llava.model.load import load_model, load_processor

    model, processor = load_model(checkpoint, torch.float32), load_processor(checkpoint)
    batch = processor(images=image, text=processor.prompt([{"role": "user", "content": f"<image>\n{QUESTION}"}]))
    with torch.no_grad():
        logits = model(**batch).logits
        ids = model.generate(**batch, max_new_tokens=24, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return {
        "pixels": batch["pixel_values"].numpy(),
        "ids": batch["input_ids"].numpy(),
        "logits": logits.numpy(),
        "answer": processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "config": model.config,
    }


def packed_bytes(pixels, config):
    """`pixel_values` of either kind of folder as packed uint8 patches: (P, 3*patch*patch)."""
    import numpy as np
    from PIL import Image

    from llava.model.image_processing_llava_uhd import patchify

    if pixels.ndim == 2:
        return pixels
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (config.image_mean, config.image_std))
    square = np.rint((pixels[0] * std + mean) * 255).astype(np.uint8)  # stock Llava: (1, 3, side, side), normalised
    return patchify(Image.fromarray(square.transpose(1, 2, 0)), config.vision_config.patch_size)


def verify(checkpoint: str | Path, exported: str | Path, serve: bool = True) -> dict[str, str]:
    """Run every check; returns check -> what was seen, in order.

    Raises:
        UserError: the first check that fails, with both sides.
    """
    import numpy as np

    from llava.model.load import check_checkpoint

    checkpoint, exported = check_checkpoint(checkpoint), Path(exported)
    if not (exported / "config.json").is_file():
        raise UserError(f"{exported} has no config.json. Fix: name a folder written by llava.model.export_hf")
    check_sources(exported)
    with tempfile.TemporaryDirectory() as folder:
        side = json.loads((checkpoint / "config.json").read_text())["vision_config"]["image_size"]
        image = picture(side)
        image.save(f"{folder}/picture.png")
        theirs = probe(exported, Path(folder) / "picture.png")
    ours = own_view(checkpoint, image)
    seen = {"strict load": "in a process without this package"}
    if not np.array_equal(packed_bytes(theirs["pixels"], ours["config"]), ours["pixels"]):
        raise UserError(f"{exported} prepares other pixels than {checkpoint}. Fix: export again")
    seen["pixels"] = f"{ours['pixels'].size:,} bytes equal"
    if not np.array_equal(theirs["ids"], ours["ids"]):
        raise UserError(f"{exported} makes other token ids than {checkpoint}. Fix: export again")
    width = ours["logits"].shape[-1]
    difference = float(np.abs(theirs["logits"][..., :width] - ours["logits"]).max())
    if difference > 1e-3:
        raise UserError(f"{exported} gives logits that differ by {difference:.2g}. Fix: export again")
    seen["logits"] = f"{ours['logits'].size:,} values, largest difference {difference:.1g}"
    for image_width, image_height, told, made in theirs["counts"].tolist():
        if told != made:
            raise UserError(f"{exported} announces {told} tokens for {image_width}x{image_height} and makes {made}")
    seen["token counts"] = f"announced as made for {len(SIZES)} sizes"
    if serve:
        answer = ask_server(exported, image)
        if answer != ours["answer"]:
            raise UserError(f"transformers serve answers {answer!r}, the checkpoint {ours['answer']!r}")
        seen["transformers serve"] = f"answers {answer!r}, as the checkpoint does"
    return seen


@contextmanager
def served(exported: Path, seconds: float = 120.0):
    """`transformers serve` of a folder on loopback, while the block runs; gives its address.

    Raises UserError when it does not answer within `seconds`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(exported.resolve()), "--host", "127.0.0.1",
        "--port", str(port), "--device", "cpu", "--dtype", "float32", "--trust-remote-code",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules", "PYTHONPATH": ""}
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log, seconds)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def ask_server(exported: Path, image) -> str:
    """One greedy question about the image to a server of its own."""
    with served(exported) as address:
        return chat(f"{address}/v1", str(exported.resolve()), image)


def wait_for(address: str, server: subprocess.Popen, log, seconds: float) -> None:
    """Until `address` answers. Raises UserError when the server stops or takes too long, with its last line."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:  # not up yet
            time.sleep(0.2)
    log.seek(0)
    last = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
    raise UserError(f"transformers serve did not come up: {last}. Fix: run `bash training_scripts/setup.sh demo`")


def chat(base_url: str, model: str, image) -> str:
    """One greedy chat-completions request with the image as a data URL."""
    from openai import APIError, OpenAI

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    try:
        reply = OpenAI(base_url=base_url, api_key="none", max_retries=0).chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], max_tokens=24, temperature=0
        )
    except APIError as error:
        raise UserError(f"{base_url} refused the request: {error}") from error
    return reply.choices[0].message.content.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of this package")
    parser.add_argument("--exported", required=True, help="what llava.model.export_hf made of it")
    parser.add_argument("--no_serve", action="store_true", help="leave out the request against `transformers serve`")
    arguments = parser.parse_args()
    for check, seen in verify(arguments.checkpoint, arguments.exported, not arguments.no_serve).items():
        print(f"{check:<20} {seen}")


if __name__ == "__main__":
    run_command(main)
