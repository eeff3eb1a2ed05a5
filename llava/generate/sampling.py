"""Sampling several candidates for a batch of prompts.

An image is encoded and its prompt prefilled once for all its candidates. Every candidate has its own stream of random
numbers, keyed by (seed, record id, prompt style, sample), so its text does not depend on batch size, order or number
of ranks, up to floating-point differences between batch shapes. Nothing is taken from the checkpoint's
generation_config: what is not stated here does not happen.

Shapes: R rows (prompts x candidates), T prompt length, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from llava.errors import UserError
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from llava.seeds import seed_of


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn. `temperature` 0 is greedy; `num_beams` above 1 uses transformers' beam search."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    num_beams: int = 1
    max_new_tokens: int = 1200

    def __post_init__(self):
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "num_beams": self.num_beams >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, valid in checks.items():
            if not valid:
                raise UserError(f"{name} {getattr(self, name)} makes no sense; see --help")


@dataclass(frozen=True)
class Prompt:
    """One thing to answer: the user's message, with one `<image>` per image, and a seed per wanted candidate."""

    message: str
    images: list[Image.Image]
    seeds: list[int]


@dataclass(frozen=True)
class Completion:
    """A candidate's text; `finish_reason` is `stop` or `length` (cut at max_new_tokens)."""

    text: str
    finish_reason: str
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def complete(
    model: LlavaUHDForConditionalGeneration,
    processor: LlavaUHDProcessor,
    prompts: list[Prompt],
    sampling: Sampling,
) -> list[list[Completion]]:
    """Candidates for every prompt, as many as it has seeds (the same number for all prompts)."""
    count = len(prompts[0].seeds)
    if any(len(prompt.seeds) != count for prompt in prompts):
        raise ValueError("all prompts of a batch need the same number of seeds")
    texts = [processor.prompt([{"role": "user", "content": prompt.message}]) for prompt in prompts]
    inputs = processor(images=[prompt.images for prompt in prompts], text=texts).to(model.device)
    if sampling.num_beams > 1:
        rows = beam_search(model, processor, inputs, sampling, [prompt.seeds for prompt in prompts])
    else:
        seeds = [seed for prompt in prompts for seed in prompt.seeds]
        rows = decode(model, processor, inputs, sampling, seeds, count)
    completions = []
    for ids in rows:
        stopped = bool(ids) and ids[-1] in end_tokens(processor)
        text = processor.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True).strip()
        completions.append(Completion(text, "stop" if stopped else "length", len(ids)))
    return [completions[start : start + count] for start in range(0, len(completions), count)]


def end_tokens(processor: LlavaUHDProcessor) -> list[int]:
    """What ends an answer: the turn's end, or the text's end (Qwen2: `<|im_end|>`, `<|endoftext|>`)."""
    tokenizer = processor.tokenizer
    return sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})


def decode(model, processor, inputs, sampling: Sampling, seeds: list[int], count: int) -> list[list[int]]:
    """Prefill once, repeat the cache for each candidate, decode until every row has ended; token ids per row.

    The image placeholder and rows of the vocabulary that stand for no token are never chosen.
    """
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = model(**inputs, position_ids=positions, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    cache = outputs.past_key_values
    cache.batch_repeat_interleave(count)
    mask = mask.repeat_interleave(count, dim=0)
    logits = outputs.logits[:, -1].repeat_interleave(count, dim=0)  # (R, V)
    position = positions[:, -1:].repeat_interleave(count, dim=0)
    uniforms = uniform_streams(seeds, sampling.max_new_tokens).to(logits.device)  # (R, max_new_tokens)

    impossible = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    impossible[len(processor.tokenizer) :] = True
    impossible[processor.image_token_id : processor.image_token_id + 1] = True

    ends = torch.tensor(end_tokens(processor), device=logits.device)
    rows: list[list[int]] = [[] for _ in seeds]
    active = torch.arange(len(seeds), device=logits.device)
    for step in range(sampling.max_new_tokens):
        tokens = choose(logits.masked_fill(impossible, -torch.inf), uniforms[active, step], sampling)
        for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
            rows[row].append(token)
        going = ~torch.isin(tokens, ends)
        if not going.any() or step + 1 == sampling.max_new_tokens:
            break
        if not going.all():  # finished rows leave the batch
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, mask, position, tokens = active[keep], mask[keep], position[keep], tokens[keep]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        outputs = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        logits = outputs.logits[:, -1]
    return rows


def uniform_streams(seeds: list[int], length: int) -> Tensor:
    """(R, length) uniform numbers in [0, 1); row r depends on seeds[r] alone."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token per row: greedy, or by inverse transform on the top-k / top-p part of the distribution.

    Args:
        logits: (R, V). uniform: (R,) in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = (
        (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)  # the first token always stays
    cumulative = probabilities.cumsum(-1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    last_kept = (probabilities > 0).sum(-1) - 1  # rounding must not reach past it
    return tokens.gather(1, torch.minimum(chosen, last_kept)[:, None])[:, 0]


def beam_search(model, processor, inputs, sampling: Sampling, seeds: list[list[int]]) -> list[list[int]]:
    """transformers' beam search; the best beams of a prompt are its candidates, seeded by the batch's seeds."""
    count = len(seeds[0])
    if count > sampling.num_beams:
        raise UserError(f"{count} candidates from {sampling.num_beams} beams. Fix: BEAMS >= N_CANDIDATES, or BEAMS=1")
    torch.manual_seed(seed_of(*[seed for row in seeds for seed in row]))
    ends, padding = end_tokens(processor), processor.tokenizer.pad_token_id
    settings = GenerationConfig(
        num_beams=sampling.num_beams,
        num_return_sequences=count,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
           if sampling.temperature > 0 else {}),
        eos_token_id=ends,
        pad_token_id=padding,
        suppress_tokens=[processor.image_token_id],
    )  # fmt: skip
    sequences = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
    rows = []
    for ids in sequences.tolist():
        length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        rows.append(ids[:length])
    return rows
