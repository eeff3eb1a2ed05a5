"""Speed and memory of drawing six captions an image on one GPU at the shapes of LLaVA-UHD with Qwen2-7B, equality first.

    python -m tests.gpu.generation --output results.json                  # one GPU of 80 GB or more, under 9 minutes
    OMP_NUM_THREADS=1 .venv/bin/python -m tests.gpu.generation --tiny     # a small model, any machine: does it run

`one by one` is the published shape: transformers' `generate` for each candidate, its image preprocessed and encoded each
time. `batched` is `generate` with num_return_sequences=6: an image is preprocessed once, encoded and prefilled six times;
all decode until the longest answer ends. `ours` is `llava.generate.sampling.stream` with so many rows, refilled as they
end, 4 answers to one message and 2 to another (the others: all to the first). Nothing is compiled. Weights and pixels are
random, pictures of 1024x768 pixels: 6 slices and the overview. Temperature 0.7, top-p 0.9; any token but the image's and
the ends may be drawn; the head is multiplied by one number, for the entropy above. Random weights end no answer: each has
a length drawn beforehand. In `ours` its last token is made an end and goes the usual way; in `batched` its own length
counts; `one by one` draws shorter ones, images/s is reckoned at the mean length. An image is six captions of that; ratios
are of images/s, to `one by one` and the fastest `batched`. Seconds are wall time after a warm-up, from PIL images: prefill
(preprocessing, tower, projector, prompt; for `generate` a run of its own to the first token), decode with the emptying
batch at the end. `ours` takes no image after 75 s: it may have fewer than planned. GiB is the peak, weights included.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter as now
from types import SimpleNamespace
from unittest.mock import patch

import torch
import transformers
from PIL import Image
from torch.distributions import Categorical
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig

from llava.errors import UserError, run_command
from llava.generate import sampling
from llava.generate.candidates import Draw, Prompt, Sampling, end_tokens
from llava.generate.decoder import Decoder
from llava.generate.prefix_attention import Rows, shared_prefix
from llava.model.assemble import make_processor
from llava.model.chat_templates import prepare_tokenizer
from llava.prompts import CAPTION_DEFAULT, COD_DEFAULT
from tests.gpu.training import DEVICE, GPU, build

ROWS = (("one by one", 1), ("batched", 4), ("ours", 256), ("ours", 512), ("batched", 16), ("ours", 96))
COLUMNS = ("images", "tokens", "prefill s", "decode s", "tokens/s", "images/s", "GiB", "x one by one", "x batched")
MESSAGES = [f"<image>\n{COD_DEFAULT}", f"<image>\n{CAPTION_DEFAULT}"]
EACH, ENTROPY, FACTORS = 6, 1.5, [1.1**n for n in range(-20, 48)]
DRAWN = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


class Measured(Decoder):
    """Ends the answer of seed n after `lengths[n]` tokens; chooses no end itself, but ids the tokenizer does not know."""

    def __init__(self, lengths: list[int], *args):
        super().__init__(*args)
        self.lengths, self.answers, self.admission = lengths, {}, 0.0  # answers: tokens by seed
        self.impossible.fill_(False)[[self.processor.image_token_id, *self.ends]] = True

    def admit(self, prompts) -> None:
        start = now()
        super().admit(prompts)
        torch.cuda.synchronize() if GPU else None  # every other step ends with its tokens on the host
        self.admission += now() - start

    def take(self, rows, logits) -> None:
        super().take(rows, logits)
        for row in rows:
            self.answers[row.draw.seed] = row.ids
            if len(row.ids) == self.lengths[row.draw.seed]:
                row.ids[-1] = min(self.ends)


def draw(model, processor, prompts, settings: Sampling, rows: int, lengths: list[int]):
    made: list[Measured] = []
    with patch.object(sampling, "Decoder", lambda *args: made.append(Measured(lengths, *args)) or made[0]):
        list(sampling.stream(model, processor, prompts, settings, rows))
    return made[0].answers, made[0].admission  # tokens by seed, seconds


def pictures(count: int) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (count, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(each.numpy()).resize((1024, 768)) for each in pixels]  # fine noise would be even grey


def build_both(tiny: bool, layers: int, tower_layers: int, dtype=torch.bfloat16):
    model, folder = build(tiny, layers, tower_layers, dtype).eval(), "llava/toy/weights/qwen2"
    prepare_tokenizer(tokenizer := AutoTokenizer.from_pretrained(folder), folder)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return model, make_processor(tokenizer, model.config)


@torch.inference_mode()
def generate(model, processor, images: list, messages: list[str], tokens: int, **how):
    """transformers' `generate` with preprocessing: new tokens (rows, tokens) and, if asked for, their raw logits."""
    how |= {"max_new_tokens": tokens, "suppress_tokens": [processor.image_token_id, *end_tokens(processor)]}
    texts = [processor.prompt([{"role": "user", "content": message}]) for message in messages]
    inputs = processor(images=images, text=texts).to(DEVICE)
    answer = model.generate(**inputs, generation_config=GenerationConfig(return_dict_in_generate=True, **how))
    assert answer.sequences.shape[1] == inputs["input_ids"].shape[1] + tokens
    return answer.sequences[:, -tokens:], answer.logits


def tokens_equal(tiny: bool) -> str:
    """Greedy answers to four prompts of different lengths, float32, four full-width layers of the language model."""
    (model, processor), tokens, equal = build_both(tiny, 4, 3, torch.float32), 8 if tiny else 32, 0
    for name, weight in model.model.language_model.layers.named_parameters():
        weight.data.mul_(2 if "proj.weight" in name else 1)  # random attention is too even for pictures to matter
    images, messages = pictures(4), [MESSAGES[0] + " Again." * (n // 2) for n in range(4)]
    prompts = [(n, Prompt([images[n]], [messages[n]], [Draw(0, n)])) for n in range(4)]
    ours, _ = draw(model, processor, prompts, Sampling(temperature=0, max_new_tokens=tokens), 4, [tokens + 1] * 4)
    theirs, logits = generate(model, processor, images, messages, tokens, do_sample=False, output_logits=True)
    for number, wanted in enumerate(theirs.tolist()):
        for row, mine, other in zip(logits, ours[number], wanted, strict=True):
            assert row[number, other] - row[number, mine] < 1e-3 * row[number].std(), (number, equal)
            if mine != other:  # rounding decided; what follows differs
                break
            equal += 1
    return f"{equal} of {4 * tokens} equal before a tie, {len(set(map(tuple, ours.values())))} different answers of 4"


def attention_equal(tiny: bool) -> str:
    """`shared_prefix` against plain attention row by row: 24 rows of 4 places, everything of random length."""
    heads, pairs, width = (4, 2, 32) if tiny else (28, 4, 128)
    with torch.device(DEVICE):
        places, starts, lengths = torch.arange(24) % 4, torch.randint(900, 1061, (4,)), torch.randint(1, 580, (24,))
        prefix, own = torch.randn(2, 4, pairs, 1061, width), torch.randn(2, 24, pairs, 580, width)
        new, query = torch.randn(2, 24, pairs, 1, width), torch.randn(24, heads, 1, width)
    stores = [SimpleNamespace(keys=part[0, None], values=part[1, None]) for part in (prefix, own)]
    rows, off = Rows(*stores, places, starts, lengths), 0.0
    ours, _ = shared_prefix(SimpleNamespace(layer_idx=0), query, *new, None, rows=rows)
    for row, place in enumerate(places.tolist()):
        seen = prefix[:, place, :, : starts[place]], own[:, row, :, : lengths[row]], new[:, row]
        plain = F.scaled_dot_product_attention(query[row, None], *torch.cat(seen, 2)[:, None], enable_gqa=True)
        off = max(off, (ours[row] - plain[0].transpose(0, 1)).abs().max().item())
    assert off < 1e-5, off
    return f"max difference to SDPA {off:.1g}"


def scale_head(model, processor, tiny: bool) -> str:
    """Multiply the head so that tokens have an entropy of about `ENTROPY` nats, in the contexts that drawing leads to."""
    total, factor, found, how = 1.0, 1.0, [], DRAWN | {"output_logits": True}
    while len(found) < 6 and not (found and 0.8 < found[-1] / ENTROPY < 1.25):
        model.lm_head.weight.data.mul_(factor)
        total *= factor
        _, logits = generate(model, processor, pictures(4), MESSAGES * 2, 8 if tiny else 64, **how)
        nats = {n: Categorical(logits=torch.cat(logits).float() * n).entropy().mean().item() for n in FACTORS}
        factor = min(nats, key=lambda n: abs(nats[n] - ENTROPY))
        found.append(nats[1.0])
    return f"head times {total:.3g}: {found[-1]:.2f} nats a token at temperature 1, {found[0]:.1f} unscaled"


def measure(model, processor, step: str, size: int, lengths: list[int], tiny: bool) -> dict:
    """`size` is the number of images, for `ours` of rows. Three answers one by one; six to an image otherwise."""
    images, seen, mean = pictures(32 if step == "ours" else size), [], (min(lengths) + max(lengths)) / 2

    def feed(count: int, until: float):
        while len(seen) < count and (len(seen) < 64 or now() < until):
            seen.append([Draw(int(n >= 4), EACH * len(seen) + n) for n in range(EACH)])
            yield len(seen), Prompt([images[len(seen) % 32]], MESSAGES, seen[-1])

    if step == "ours":
        draw(model, processor, feed(4, now()), Sampling(), size, [4] * len(lengths))  # warm-up
        seen.clear()
        planned, start = size // 4 if tiny else max(64, size // 2), now()
        answers, first = draw(model, processor, feed(planned, start + 75), Sampling(), size, lengths)
        whole, size, tokens = now() - start, len(seen), sum(map(len, answers.values()))
        assert {n: len(ids) for n, ids in answers.items()} == dict(enumerate(lengths[: EACH * size]))
    else:
        repeats, each, wanted = (1, EACH, lengths[: EACH * size]) if step == "batched" else (3, 1, [8 if tiny else 128])
        whole, tokens = 0.0, repeats * sum(wanted)
        for longest in (2, 1, max(wanted)):  # warm-up, to the first token, all
            first, start = whole, now()
            for _ in range(repeats):
                generate(model, processor, images, MESSAGES[:1] * size, longest, num_return_sequences=each, **DRAWN)
            whole = now() - start
    rate = tokens / whole / mean / EACH
    if step == "one by one":  # the first token's time, and a later one's for each of the rest
        rate = repeats / (first + (whole - first) * (mean - 1) / (longest - 1)) / EACH
    values = [size, tokens, first, whole - first, tokens / whole, rate, torch.cuda.max_memory_allocated() / 2**30]
    return dict(zip(COLUMNS, values, strict=False))  # ratios follow


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, short answers; runs on a CPU too")
    parser.add_argument("--output", type=Path, help="write the table as JSON to this file")
    arguments = parser.parse_args()
    if not (GPU or arguments.tiny):
        raise UserError("this benchmark wants a GPU and torch sees none. Fix: use a machine with one, or try --tiny")
    began, tiny, rows = now(), arguments.tiny, [{"step": step, "size": size} for step, size in ROWS]
    torch.manual_seed(0)
    lengths = torch.randint(4 if tiny else 250, 9 if tiny else 551, (EACH * 256,)).tolist()
    said = {"hardware": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__}
    said |= {"transformers": transformers.__version__, "lengths": f"uniform, {min(lengths)} to {max(lengths)} tokens"}
    said |= {"attention": attention_equal(tiny), "greedy tokens": tokens_equal(tiny)}
    both = build_both(tiny, *((2, 3) if tiny else (28, 24)))
    said["entropy"] = scale_head(*both, tiny)
    print("\n".join(f"{key:<15}{value}" for key, value in said.items()), flush=True)
    for row in rows:
        torch.cuda.reset_peak_memory_stats() if GPU else None
        try:
            row |= measure(*both, *row.values(), lengths, tiny) if now() - began < 420 else {"note": "out of time"}
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        torch.cuda.empty_cache()
        print(f"{now() - began:5.0f} s  {' '.join(map(str, row.values()))}", flush=True)
    print(f"\n{'':<18}" + "".join(f"{column:>14}" for column in COLUMNS))
    for row in rows:
        for base in ("one by one", "batched") if "images/s" in row else ():
            against = [each["images/s"] for each in rows if each["step"] == base and "images/s" in each]
            row[f"x {base}"] = row["images/s"] / max(against) if against else None
        texts = ["" if n is None else f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in map(row.get, COLUMNS)]
        print(f"{row['step']} x {row['size']:<5}".ljust(18) + (row.get("note") or "".join(f"{n:>14}" for n in texts)))
    print(__doc__[__doc__.index("\n`one") :])
    if arguments.output:
        arguments.output.write_text(json.dumps(said | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
