"""Speed and memory of a training step on one GPU at the shapes of LLaVA-UHD with Qwen2-7B, equality first.

    python -m tests.gpu.training --output results.json                  # one GPU of 80 GB or more, under 9 minutes
    OMP_NUM_THREADS=1 .venv/bin/python -m tests.gpu.training --tiny     # a small model, any machine: does it run

`ours` is the model's own packed step. `padded` has the shape of a plain HF Trainer: samples padded to the longest, a
mask for attention, every position's logits in float32, one picture after another through the tower; it has our tower
and resampler, which flatters it. `liger` is `padded` with Liger's kernels in the language model and its fused loss.
Ratios are of samples/s to these two, in the same stage, with AdamW in both or in neither.
Weights, tokens and pixels are random. Pictures have 1024x768 pixels: 6 slices and the overview (align: overview only).
Text has 200 to 600 tokens (align: 30 to 90), uniform, all but the first 20 learned. Five batches in turn, on the device
before the clock starts: data loading is not inside. Fine-tune trains every part, align the projector. `rest` clears
gradients and, where the row says so, runs AdamW (fused, state in bf16, no float32 weights). Other rows are forward and
backward alone, as on a rank of 32: weights and gradients whole, optimiser state elsewhere. MFU strict counts real
tokens, half of attention, the head at labels, layers used and the cheapest exact resampler; usual the head at every
real token and the resampler as published; neither recomputation. Times are means on the GPU's clock, GiB the peak.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers.utils import is_liger_kernel_available

from llava.data.collator import Collator
from llava.errors import UserError, run_command
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.packed_attention import PACKED_SDPA
from llava.model.resampler import pooled_size
from llava.model.slicing import plan_slices
from llava.train.parts import PARTS, set_trainable
from llava.train.recompute import checkpointing_kwargs
from llava.train.stage import fuse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 FLOP/s, dense, of the SXM parts
KEYS = ("stage", "step", "samples", "recomputing", "AdamW")
ROWS = (  # Liger comes last: it changes transformers for good
    ("fine-tune", "padded", 4, "all", False), ("fine-tune", "ours", 4, "all", False),
    ("fine-tune", "ours", 11, "all", False), ("fine-tune", "ours", 11, "selectively", False),
    ("fine-tune", "ours", 8, "nothing", False), ("align", "padded", 8, "all", True),
    ("align", "ours", 8, "nothing", True), ("align", "ours", 64, "nothing", True),
    ("fine-tune", "padded", 4, "all", True), ("fine-tune", "ours", 11, "selectively", True),
    ("fine-tune", "liger", 4, "all", False), ("fine-tune", "ours+liger", 11, "selectively", False),
)  # fmt: skip
COLUMNS = ("tokens", "forward ms", "backward ms", "rest ms", "samples/s", "tokens/s", "MFU strict", "MFU usual", "GiB",
           "x padded", "x liger")  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def build(tiny: bool, layers: int, tower_layers: int, dtype=torch.bfloat16) -> LlavaUHDForConditionalGeneration:
    """Qwen2-7B behind CLIP-ViT-L/14-336 and 144 tokens a slice, or a small one of the same make."""
    text, vision = ((128, 256, 4), (64, 128, 2)) if tiny else ((3584, 18_944, 28), (1024, 4096, 16))
    side, pairs, vocabulary, grid, image = (112, 2, 1024, 4, 1000) if tiny else (336, 4, 152_064, 12, 151_646)
    text = dict(zip(SIZES, (*text, layers), strict=True), num_key_value_heads=pairs, vocab_size=vocabulary)
    vision = dict(zip(SIZES, (*vision, tower_layers), strict=True), image_size=side, patch_size=14)
    config = LlavaUHDConfig(vision_config=vision, text_config=text, resampler_grid=grid, image_token_id=image)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = LlavaUHDForConditionalGeneration(config).train()
    torch.set_default_dtype(torch.float32)
    return model


def make_batch(config: LlavaUHDConfig, stage: str, count: int, seed: int, packing: bool) -> tuple[list[dict], dict]:
    generator, samples = torch.Generator().manual_seed(seed), []
    plan, side = plan_slices(1024, 768, config.vision_config.image_size), config.resampler_grid
    (columns, rows), lengths = (plan.grid, (200, 601)) if stage == "fine-tune" else ((0, 0), (30, 91))
    sizes, image = [plan.slice_size] * (rows * columns) + [plan.overview_size], [config.image_token_id]
    shapes = torch.tensor([(height // 14, width // 14) for width, height in sizes])
    picture = (image * (columns * side) + [198]) * (rows * side) + [11] * bool(rows) + image * side**2
    for number in range(count):
        length = torch.randint(*lengths, (1,), generator=generator).tolist()
        text = torch.randint(200, image[0], length, generator=generator).tolist()
        pixels = torch.randint(0, 256, (int(shapes.prod(1).sum()), 588), dtype=torch.uint8, generator=generator)
        samples.append({
            "id": str(number), "input_ids": picture + text, "labels": [-100] * (len(picture) + 20) + text[20:],
            "pixel_values": pixels, "slice_shapes": shapes, "grids": torch.tensor([[rows, columns]]),
        })  # fmt: skip
    batch = Collator(0, packing)(samples)
    return samples, {key: value.to(DEVICE) for key, value in batch.items() if key != "ids"}


def work(config: LlavaUHDConfig, stage: str, sample: dict) -> tuple[float, float]:
    """FLOP of one sample's step: (strictly needed, as usually counted)."""
    text, vision, queries = config.text_config, config.vision_config, config.resampler_grid**2
    width, depth, narrow = text.hidden_size, text.num_hidden_layers, vision.hidden_size
    passes, tower_passes = (2, 1) if stage == "align" else (3, 3)  # what is frozen needs no gradient of its weights
    length, learned = len(sample["input_ids"]), sum(label != -100 for label in sample["labels"])
    keys, head, extra = text.num_key_value_heads / text.num_attention_heads, passes * 2 * width * text.vocab_size, 0
    body = depth * width * (2 * width * (1 + keys) + 3 * text.intermediate_size)
    needed = passes * (2 * body * length + 2 * length**2 * width * depth) + head * learned
    for rows, columns in sample["slice_shapes"].tolist():
        n, bins = rows * columns, math.prod(pooled_size(rows, columns))
        layer = 4 * narrow * (2 * narrow + vision.intermediate_size) * (n + 1) + 4 * (n + 1) ** 2 * narrow
        needed += tower_passes * ((vision.num_hidden_layers - 1) * layer + 2 * n * 588 * narrow)  # the last is not used
        needed += 6 * n * narrow * width + (18 * width + 12 * config.resampler_heads * bins) * queries * width
        extra += 12 * (width - config.resampler_heads) * bins * queries * width
    return needed, needed + extra + head * (length - learned)


def loss_of(model, batch: dict) -> torch.Tensor:
    text = model.model.language_model
    text.config._attn_implementation = PACKED_SDPA if "cu_seq_lens" in batch else "sdpa"
    if "cu_seq_lens" in batch:  # packed
        return model(**batch).loss
    shapes, grids = batch["slice_shapes"].split((batch["grids"].prod(1) + 1).tolist()), batch["grids"].split(1)
    pixels = batch["pixel_values"].split([int(each.prod(1).sum()) for each in shapes])
    features = torch.cat([model.model.encode_images(*one) for one in zip(pixels, shapes, grids, strict=True)])
    image = batch["input_ids"] == model.config.image_token_id
    embedded = text.embed_tokens(batch["input_ids"].masked_fill(image, 0)).masked_scatter(image[..., None], features)
    hidden = text(inputs_embeds=embedded, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    hidden, targets = hidden.flatten(0, 1), F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    if model.lm_head.fused_loss is not None:  # Liger's
        return model.lm_head(hidden, targets) / (targets != -100).sum()
    return F.cross_entropy(model.lm_head(hidden).float(), targets)


def equality(tiny: bool) -> str:
    """Two full-width layers of tower and language model, equal weights: packed bfloat16 against padded float32."""
    half, full = build(tiny, 2, 3), build(tiny, 2, 3, torch.float32)  # the tower's last layer is not used
    full.load_state_dict(half.state_dict())
    losses, gradients = [], []
    for model in (half, full):
        set_trainable(model, list(PARTS))
        loss = loss_of(model, make_batch(model.config, "fine-tune", 3, seed=0, packing=model is half)[1])
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.model.projector.parameters()]))
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    assert math.isclose(*losses, rel_tol=2e-3), losses
    assert cosine > 0.99, cosine
    return f"loss {losses[0]:.4f} packed bf16, {losses[1]:.4f} padded fp32; projector gradients at cosine {cosine:.5f}"


def now():
    """A moment on the GPU's own clock, or the CPU's."""
    moment = torch.cuda.Event(enable_timing=True) if GPU else time.perf_counter()
    if GPU:
        moment.record()
    return moment


def seconds(start, end) -> float:
    if GPU:
        end.synchronize()
    return start.elapsed_time(end) / 1e3 if GPU else end - start


def ceilings(side: int, rows: int, repeats: int) -> str:
    """Rates of a large product and a large copy of random numbers, after as long a warm-up."""
    left, right, source = (torch.randn(n, side, device=DEVICE, dtype=torch.bfloat16) for n in (side, side, rows))
    target, rates = torch.empty_like(source), []
    for run, amount in ((lambda: left @ right, 2 * side**3), (lambda: target.copy_(source), 4 * source.numel())):
        for _ in range(2):
            start = now()
            for _ in range(repeats):
                run()
            spent = seconds(start, now())
        rates.append(repeats * amount / spent / 1e12)
    return f"{rates[0]:.3g} TFLOP/s bf16 product, {rates[1]:.3g} TB/s copy (read and written)"


def measure(model, row: dict, peak: float | None, tiny: bool) -> dict:
    stage, ours = row["stage"], row["step"].startswith("ours")
    warm_up, steps = (1, 2) if tiny else (5, 15) if ours else (3, 8)
    batches = [make_batch(model.config, stage, row["samples"], seed, packing=ours) for seed in range(5)]
    set_trainable(model, ["projector"] if stage == "align" else list(PARTS))
    model.gradient_checkpointing_disable()
    if row["recomputing"] != "nothing":
        model.gradient_checkpointing_enable(checkpointing_kwargs(row["recomputing"] == "selectively"))
    if "liger" in row["step"] and model.lm_head.fused_loss is None:
        _, batch = make_batch(model.config, stage, 2, seed=0, packing=False)
        plain = loss_of(model, batch).item()
        fuse(model)
        assert model.lm_head.fused_loss is not None, "llava.train.stage.fuse left the head without Liger's loss"
        assert math.isclose(loss_of(model, batch).item(), plain, rel_tol=2e-3), plain
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if row["AdamW"] else None
    torch.cuda.reset_peak_memory_stats() if GPU else None
    times, seen = [], []
    for number in range(warm_up + steps):
        (samples, batch), marks = batches[number % 5], [now()]
        loss = loss_of(model, batch)
        marks.append(now())
        loss.backward()
        marks.append(now())
        if optimiser:
            optimiser.step()
        model.zero_grad(set_to_none=True)
        marks.append(now())
        assert loss.isfinite(), loss
        if number >= warm_up:
            times.append([seconds(*marks[part : part + 2]) for part in range(3)])
            seen += samples
    spent, tokens = sum(map(sum, times)), sum(len(sample["input_ids"]) for sample in seen)
    flop = zip(*(work(model.config, stage, sample) for sample in seen), strict=True)
    shares = [sum(each) / spent / peak if peak else None for each in flop]
    values = [tokens / steps, *(1e3 * sum(part) / steps for part in zip(*times, strict=True)), len(seen) / spent]
    values += [tokens / spent, *shares, torch.cuda.max_memory_allocated() / 2**30 if GPU else None]
    return dict(zip(COLUMNS, values, strict=False))  # ratios follow


def table(rows: list[dict]) -> None:
    speed = {(row["stage"], row["AdamW"], row["step"]): row["samples/s"] for row in rows if "tokens" in row}
    print(f"\n{'':<54}" + "".join(f"{column:>12}" for column in COLUMNS))
    for row in rows:
        name = "{stage} {step} x {samples}, recomputing {recomputing}".format(**row) + ", AdamW" * row["AdamW"]
        for base in ("padded", "liger") if "tokens" in row else ():
            against = speed.get((row["stage"], row["AdamW"], base))
            row[f"x {base}"] = row["samples/s"] / against if against else None
        texts = ["" if n is None else f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in map(row.get, COLUMNS)]
        print(f"{name:<54}" + (row.get("note") or "".join(f"{text:>12}" for text in texts)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu.training", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, two steps a row; runs on a CPU too")
    parser.add_argument("--output", type=Path, help="write the table as JSON to this file")
    arguments = parser.parse_args()
    if not (GPU or arguments.tiny):
        raise UserError("this benchmark wants a GPU and torch sees none. Fix: use a machine with one, or try --tiny")
    began, tiny, rows = time.perf_counter(), arguments.tiny, [dict(zip(KEYS, row, strict=True)) for row in ROWS]
    hardware = torch.cuda.get_device_name() if GPU else "CPU"
    peak = next((rate for name, rate in PEAKS.items() if name in hardware), None)
    said = {"hardware": hardware, "torch": torch.__version__, "transformers": transformers.__version__, "peak": peak}
    said |= {"equality": equality(tiny), "ceilings": ceilings(*(256, 4096, 10) if tiny else (8192, 2**18, 2000))}
    print("\n".join(f"{key:<13}{value}" for key, value in said.items()), flush=True)
    model = build(tiny, *((2, 3) if tiny else (28, 24)))
    try:
        for row in rows:
            if time.perf_counter() - began > 400:  # a row takes two minutes at most
                row["note"] = "not measured (out of time)"
            elif "liger" in row["step"] and not (GPU and is_liger_kernel_available()):
                row["note"] = f"not measured ({'liger-kernel is not installed' if GPU else 'Liger needs a GPU'})"
            else:
                try:
                    row |= measure(model, row, peak, tiny)
                except torch.cuda.OutOfMemoryError:
                    row["note"] = "out of memory"
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            print(f"{time.perf_counter() - began:5.0f} s  {' '.join(map(str, row.values()))}", flush=True)
    finally:
        table(rows)
        print(__doc__[__doc__.index("\n`ours`") :])
        if arguments.output:
            arguments.output.write_text(json.dumps(said | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
