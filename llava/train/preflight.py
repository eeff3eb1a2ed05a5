"""What a training run will do, before it does it: data, tokens, labels, batch, memory, work.

`DRY_RUN=1` prints it; every run writes it to `preflight.txt` beside its output.
"""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np

from llava.data.dataset import ConversationDataset
from llava.data.packing import PackSampler
from llava.errors import UserError
from llava.train.parts import PARTS, numbers, part_modules

A100 = 312e12  # bf16 FLOP/s, dense
UTILISATION = 0.4  # assumed for the estimate


def report(
    dataset: ConversationDataset,
    sizes: np.ndarray,
    packs: PackSampler | None,
    model,
    arguments,
    world_size: int,
    four_bit: bool = False,
) -> Iterator[str]:
    """The lines of the preflight, as they become known.

    Args:
        sizes: of `dataset.sizes()`.
        packs: what trains together; None when rows are padded.
        model: with parts already frozen; may be on the meta device.
        arguments: the TrainingArguments.
        four_bit: the language model's frozen matrices take half a byte a number.

    Raises:
        UserError: no token of the whole dataset is learned from.
    """
    with_image = sum(1 for record in dataset.records if record.get("image"))
    yield f"records      {len(dataset):,} ({with_image:,} with images, {len(dataset) - with_image:,} text only)"
    yield from token_lines(dataset, sizes)
    yield from label_lines(dataset)
    yield batch_line(len(dataset), arguments, world_size)
    if packs:
        yield f"packs        {packs.fill():.1%} of the work is not waiting for the largest pack"
    yield from model_lines(model, sizes, arguments, world_size, four_bit)


def batch_line(samples: int, arguments, world_size: int) -> str:
    micro, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    batch = micro * accumulation * world_size
    steps = -(-samples // batch) * arguments.num_train_epochs if arguments.max_steps < 0 else arguments.max_steps
    return (
        f"global batch {batch} = {micro} a device x {accumulation} accumulation x {world_size} processes, "
        f"{int(steps):,} steps"
    )


def token_lines(dataset: ConversationDataset, sizes: np.ndarray) -> Iterator[str]:
    total = sizes[:, :2].sum(1)
    median, most, longest = (int(np.quantile(total, share)) for share in (0.5, 0.95, 1))
    over = np.flatnonzero(total > dataset.max_length)
    yield f"tokens       {total.sum():,}; a sample has {median:,} (median), {most:,} (95%), at most {longest:,}"
    if len(over):
        named = ", ".join(repr(dataset.records[index]["id"]) for index in over[:5])
        yield f"too long     {len(over):,} of more than --max_length {dataset.max_length:,}: {named}{' ...' * (len(over) > 5)}"
    histogram = Counter(sizes[:, 1].tolist())
    shown = ", ".join(f"{tokens:,}: {count:,}" for tokens, count in sorted(histogram.items())[:24])
    yield f"image tokens {shown}{' ...' * (len(histogram) > 24)} (tokens: samples)"


def label_lines(dataset: ConversationDataset, samples: int = 64) -> Iterator[str]:
    """Share of learned tokens, and one sample as the model sees it; text is enough, no pixels are read."""
    tokenizer, image = dataset.processor.tokenizer, dataset.processor.image_token_id
    order = random.Random(0).sample(range(len(dataset)), len(dataset))
    learned = seen = 0
    shown = None
    for number, index in enumerate(order):
        ids, labels = dataset.encode(dataset.records[index], dataset.image_sizes(index))
        here = sum(label != -100 for label in labels)
        learned, seen = learned + here, seen + len(ids)
        if here and (shown is None):
            shown = index, ids, labels
        if number + 1 >= samples and learned:
            break
    if not learned:
        raise UserError(
            f"none of the {seen:,} tokens of {len(dataset):,} records is learned from. "
            "Fix: the records need answers (turns of `gpt`)"
        )
    yield f"learned      {learned / seen:.1%} of the tokens of {min(samples, len(dataset))} samples"
    index, ids, labels = shown
    text, previous = "", -100
    for token, label in zip(ids, labels, strict=True):
        if (label == -100) != (previous == -100):
            text += "«" if label != -100 else "»"
        text += "\0" if token == image else tokenizer.decode([token])
        previous = label
    text += "»" * (previous != -100)
    pictures = text.count("\0")
    text = text.replace("\0", "")
    yield f"sample       {dataset.records[index]['id']!r}, {pictures} image tokens left out, «learned»:"
    yield from (f"             | {line}" for line in text.strip().splitlines() if line.strip())


def model_lines(model, sizes: np.ndarray, arguments, world_size: int, four_bit: bool) -> Iterator[str]:
    trained, total = {}, 0
    for part in PARTS:
        own = {id(p): p for module in part_modules(model)[part] for p in module.parameters()}.values()
        trained[part] = sum(numbers(p) for p in own if p.requires_grad)
        total += sum(numbers(p) for p in own)
    learning = sum(trained.values())
    yield f"trains       {', '.join(f'{part} {count:,}' for part, count in trained.items() if count)} of {total:,} parameters"
    needed = memory(total, learning, arguments, world_size)
    if four_bit:
        matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2 and not p.requires_grad]
        needed -= (4 - 0.52) * sum(map(numbers, matrices))  # and scales: 0.127 bits a number (arXiv 2305.14314)
    yield f"memory       about {needed / 2**30:.2f} GiB a device, activations not counted"
    vision = sum(numbers(p) for p in model.model.vision_tower.parameters())
    frozen = total - learning
    passes = 6 * learning + 4 * frozen * (learning > 0)  # forward and backward; frozen parts pass gradients through
    share = passes / total
    epochs = arguments.num_train_epochs
    work = share * ((total - vision) * sizes[:, :2].sum() + vision * sizes[:, 2].sum()) * epochs
    hours = work / (A100 * UTILISATION * world_size) / 3600
    yield f"work         {work:.1e} FLOP, about {hours:.2g} h on {world_size} A100 at {UTILISATION:.0%} (an estimate, not measured)"


def memory(total: int, learning: int, arguments, world_size: int) -> float:
    """Bytes of weights, gradients and AdamW's state on one device."""
    plugin = getattr(arguments, "hf_deepspeed_config", None)
    if plugin is None:  # no DeepSpeed
        return 4 * total + (4 + 8) * learning  # float32 throughout, kept whole on every device
    weight = 2 if plugin.is_true("bf16.enabled") or arguments.bf16 else 4
    state = 12 * learning / world_size  # float32 copy and two moments, split over ranks from ZeRO-1 on
    gradients = weight * learning / (world_size if plugin.is_zero2() or plugin.is_zero3() else 1)
    weights = weight * total / (world_size if plugin.is_zero3() else 1)
    return weights + gradients + state
