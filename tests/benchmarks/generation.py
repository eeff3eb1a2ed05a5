"""Speed of drawing six candidates for each of four images, with equal tokens.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.generation [--continuous]

Against transformers' `generate`: one candidate at a time, image encoded and prompt prefilled for each (the published
shape); six at a time of all images in one batch; and its continuous batching, which takes text alone and therefore gets
as many text tokens as the image has.
"""

import copy
import sys

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from llava.generate.candidates import Draw, Prompt, Sampling
from llava.generate.sampling import complete
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from tests.benchmarks.compare import compare, header

IMAGES, CANDIDATES, LENGTH = 4, 6, 32
MESSAGE = "<image>\nPlease generate a detailed caption of this image."


def build():
    """Eight layers of width 768 on a thin tower; no token ends an answer, so that all lengths are equal."""
    from transformers import AutoTokenizer

    from llava.model.chat_templates import prepare_tokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("llava/toy/weights/qwen2")
    prepare_tokenizer(tokenizer, "llava/toy/weights/qwen2")
    config = LlavaUHDConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
            num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=False, initializer_range=0.08,
        ),
        resampler_grid=12, resampler_heads=6, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = LlavaUHDForConditionalGeneration(config).eval()
    processor = LlavaUHDProcessor(LlavaUHDImageProcessor(), tokenizer, resampler_grid=12)
    with torch.no_grad():
        ends = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id})
        model.lm_head.weight[ends] = 0  # never the likeliest
    return model, processor


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (576, 768, 3), dtype=np.uint8)) for _ in range(IMAGES)]


def bench_generation(rounds: int = 3) -> dict[str, float]:
    model, processor = build()
    images, suppressed = pictures(), [processor.image_token_id]
    text = processor.prompt([{"role": "user", "content": MESSAGE}])
    end = processor.tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=False, eos_token_id=end, pad_token_id=end, suppress_tokens=suppressed
    )

    def decoded(ids: torch.Tensor) -> list[str]:
        return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def ours() -> list[str]:
        prompts = [Prompt([image], [MESSAGE], [Draw(0, n) for n in range(CANDIDATES)]) for image in images]
        rows = complete(model, processor, prompts, Sampling(temperature=0, max_new_tokens=LENGTH))
        return [completion.text for row in rows for completion in row]

    @torch.inference_mode()
    def one_by_one() -> list[str]:
        texts = []
        for image in images:
            for _ in range(CANDIDATES):
                inputs = processor(images=[image], text=[text])
                ids = model.generate(**inputs, generation_config=settings)
                texts += decoded(ids[:, inputs["input_ids"].shape[1] :])
        return texts

    @torch.inference_mode()
    def together() -> list[str]:
        inputs = processor(images=images, text=[text] * IMAGES)
        width = inputs["input_ids"].shape[1]
        inputs = model._expand_inputs_for_generation(CANDIDATES, **inputs)[1] | {
            "input_ids": inputs["input_ids"].repeat_interleave(CANDIDATES, 0)
        }
        return decoded(model.generate(**inputs, generation_config=settings)[:, width:])

    def same(one: list[str], other: list[str]) -> None:
        assert one == other
        assert len(set(one)) == IMAGES

    ratios = {}
    for name, baseline, times in (("one at a time", one_by_one, 1), ("batched, six an image", together, rounds)):
        ratios[name] = compare(f"4 images x 6 captions of {LENGTH}: generate, {name}", baseline, ours, same, times)
    return ratios


def bench_continuous(length: int = 4) -> float:
    """transformers' continuous batching of the language model alone; ours on the same tokens as text. A few tokens
    only: on a CPU it takes minutes.
    """
    model, processor = build()
    language = Qwen2ForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    generator = torch.Generator().manual_seed(0)
    words = processor.tokenizer.convert_ids_to_tokens(range(300, 700))
    messages = []
    for _ in range(IMAGES):
        picked = torch.randint(0, len(words), (700,), generator=generator).tolist()
        messages.append(processor.tokenizer.convert_tokens_to_string([words[index] for index in picked]))
    prompts = [
        processor.tokenizer(processor.prompt([{"role": "user", "content": message}]), add_special_tokens=False)[
            "input_ids"
        ]
        for message in messages
    ]
    end = processor.tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=end, pad_token_id=end)

    def continuous() -> list[str]:
        rows = [ids for ids in prompts for _ in range(CANDIDATES)]
        outputs = language.generate_batch(inputs=rows, generation_config=settings, progress_bar=False)
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.split("_")[-1]))
        return [processor.tokenizer.decode(out.generated_tokens, skip_special_tokens=True).strip() for out in ordered]

    def ours() -> list[str]:
        asked = [Prompt([], [message], [Draw(0, n) for n in range(CANDIDATES)]) for message in messages]
        rows = complete(model, processor, asked, Sampling(temperature=0, max_new_tokens=length))
        return [completion.text for row in rows for completion in row]

    def same(one: list[str], other: list[str]) -> None:
        assert one == other

    name = f"4 prompts of {len(prompts[0])} tokens x 6 of {length}: generate_batch"
    return compare(name, continuous, ours, same, rounds=1)


if __name__ == "__main__":
    header()
    bench_generation()
    if "--continuous" in sys.argv:
        bench_continuous()
