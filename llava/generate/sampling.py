"""Sampling several candidates for each of many prompts.

Each candidate has its own stream of random numbers, keyed by (seed, record id, prompt style, sample), so its text does
not depend on batch size, order or number of ranks, up to floating-point differences between batch shapes. Nothing is
taken from the checkpoint's generation_config: what is not stated here does not happen.
"""

from collections.abc import Iterable, Iterator

import torch
from transformers import GenerationConfig

from llava.errors import UserError
from llava.generate.candidates import Completion, Finished, Key, More, Prompt, Sampling, completion_of, end_tokens
from llava.generate.decoder import Decoder
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from llava.seeds import seed_of


def complete(
    model: LlavaUHDForConditionalGeneration,
    processor: LlavaUHDProcessor,
    prompts: list[Prompt],
    sampling: Sampling,
) -> list[list[Completion]]:
    """Candidates of every prompt, in the order of its draws; all prompts are in flight together."""
    rows = sum(len(prompt.draws) for prompt in prompts)
    finished = dict(stream(model, processor, enumerate(prompts), sampling, rows))
    return [[completion for _, completion in finished[number]] for number in range(len(prompts))]


@torch.inference_mode()
def stream(
    model: LlavaUHDForConditionalGeneration,
    processor: LlavaUHDProcessor,
    prompts: Iterable[tuple[Key, Prompt]],
    sampling: Sampling,
    rows: int,
    more: More | None = None,
) -> Iterator[tuple[Key, Finished]]:
    """Every prompt's key with its draws and their completions, as prompts are finished.

    Args:
        prompts: taken as room becomes free.
        rows: candidates decoded at a time; a prompt may have more draws than that.
        more: asked when a prompt's draws are done; further draws to make for it, or none.
    """
    if sampling.num_beams > 1:
        for key, prompt in prompts:
            yield key, beam_search(model, processor, prompt, sampling)
        return
    decoder = Decoder(model, processor, sampling, rows, more)
    waiting = iter(prompts)
    exhausted = False
    while decoder.groups or not exhausted:
        free, new = 0 if exhausted else decoder.free(), []
        while free > 0 and not exhausted:
            taken = next(waiting, None)
            exhausted = taken is None
            if taken:
                new.append(taken)
                free -= len(taken[1].draws)
        decoder.admit(new)
        yield from decoder.step()


def beam_search(model, processor, prompt: Prompt, sampling: Sampling) -> Finished:
    """transformers' beam search, message by message; the best beams are the candidates, seeded by the message's draws."""
    finished = {}
    for number, message in enumerate(prompt.messages):
        draws = [draw for draw in prompt.draws if draw.message == number]
        count = len(draws)
        if count > sampling.num_beams:
            raise UserError(
                f"{count} candidates from {sampling.num_beams} beams. Fix: BEAMS >= N_CANDIDATES, or BEAMS=1"
            )
        if not draws:
            continue
        text = processor.prompt([{"role": "user", "content": message}])
        inputs = processor(images=prompt.images, text=[text]).to(model.device)
        torch.manual_seed(seed_of(*[draw.seed for draw in draws]))
        settings = GenerationConfig(
            num_beams=sampling.num_beams,
            num_return_sequences=count,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
               if sampling.temperature > 0 else {}),
            eos_token_id=end_tokens(processor),
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=[processor.image_token_id],
        )  # fmt: skip
        own = model.generation_config
        model.generation_config = GenerationConfig()  # its own would fill in what is not stated
        try:
            sequences = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
        finally:
            model.generation_config = own
        ends = end_tokens(processor)
        for draw, ids in zip(draws, sequences.tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
            finished[draw] = completion_of(
                processor, ids[:length], ids[length - 1] in ends, inputs["input_ids"].shape[1]
            )
    return [(draw, finished[draw]) for draw in prompt.draws]
