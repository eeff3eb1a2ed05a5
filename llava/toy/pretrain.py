"""Train the toy world's tokenizer, language model and CLIP tower from nothing.

    python -m llava.toy.pretrain --output NEW --minutes 34

Real users start from pre-trained CLIP and Qwen2; the quickstart starts from these. The tokenizer is a byte-level BPE
with Qwen2's special tokens; the language model (Qwen2 layout) reads text only; the tower (CLIP layout) learns by
captioning rendered scenes through a throw-away projector and decoder. Scenes use seeds that the world never uses.
Both models are saved in float16, in the published folder layout.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from llava.model.chat_templates import CHATML
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor, pad
from llava.prompts import ANSWER_SHORT, COD_HEADINGS, COT_HEADINGS, IMAGE, render_steps, tags_to_steps
from llava.toy import texts
from llava.toy.scenes import render, sample_scene
from llava.toy.world import ALIGN_QUESTIONS, CAPTION_QUESTIONS

FIRST_SEED = 10_000_000  # the world's own scenes stay below
VOCABULARY = 1024
RESOLUTION, PATCH, GRID = 48, 8, 3


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4,
        image_size=RESOLUTION, patch_size=PATCH,
    )  # fmt: skip


def language_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


MIX = {"description": 25, "steps": 15, "short": 15, "question": 30, "reasoning": 10, "text": 5}
SHORT_MIX = {"description": 30, "short": 30, "question": 40}  # short texts first: copying is learned from them


def conversation(seed: int, mix: dict[str, int]) -> tuple[str, str]:
    """One instruction and its answer about scene `seed`, of a kind drawn from `mix`.

    Most instructions begin with the scene's facts in words, where an image would stand: the language model learns to
    answer from what comes before the question, as a real one can before it ever sees an image.
    """
    scene, rng = sample_scene(seed), random.Random(f"conversation/{seed}")
    kind = rng.choices(list(mix), weights=list(mix.values()))[0]
    if kind == "text":
        return texts.text_only(rng)
    facts = f"{texts.facts(scene)}\n" if rng.random() < 0.9 else ""
    if kind == "short":
        return facts + rng.choice(ALIGN_QUESTIONS), texts.short_caption(scene)
    if kind == "description":
        return facts + rng.choice(CAPTION_QUESTIONS), texts.description(scene)
    if kind == "steps":
        return facts + rng.choice(CAPTION_QUESTIONS), render_steps(COD_HEADINGS, texts.description_steps(scene))
    question = rng.choice(texts.questions(scene, rng))
    if kind == "reasoning":
        steps = tags_to_steps(texts.tagged_reasoning(scene, question))
        return facts + question.text, render_steps(COT_HEADINGS, steps)
    return f"{facts}{question.text}\n{ANSWER_SHORT}", question.answer


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE over the world's language, Qwen2's three special tokens, ChatML template."""
    corpus = ["\n".join(conversation(FIRST_SEED + index, MIX)) for index in range(4000)]
    corpus += ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 100
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=VOCABULARY - 4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def minimise(model: torch.nn.Module, batches, seconds: float, peak: float, name: str) -> None:
    """AdamW with warm-up and cosine over wall-clock time; clips gradients at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start, step, mean = time.time(), 0, None
    while (progress := (time.time() - start) / seconds) < 1:
        rate = peak * min((step + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**batches(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{name} {progress:4.0%} step {step} loss {mean:.4f}", flush=True)


def collate(processor: LlavaUHDProcessor, encoded: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    batch = pad([ids for ids, _ in encoded], processor.tokenizer.pad_token_id, "right")
    labels = pad([labels for _, labels in encoded], -100, "right")["input_ids"]
    return {**batch, "labels": labels}


def pretrain(output: Path, minutes: float, batch_size: int = 32) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    language = Qwen2ForCausalLM(language_config(tokenizer))
    with_image = Qwen2Tokenizer.from_pretrained(save(tokenizer, output / "qwen2"))
    with_image.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    processor = LlavaUHDProcessor(
        LlavaUHDImageProcessor(resolution=RESOLUTION, patch_size=PATCH),
        with_image,
        chat_template=CHATML,
        resampler_grid=GRID,
    )

    def text_batch(mix: dict[str, int]):
        def batch(step: int) -> dict[str, torch.Tensor]:
            encoded = []
            for seed in range(FIRST_SEED + step * batch_size, FIRST_SEED + (step + 1) * batch_size):
                question, answer = conversation(seed, mix)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                encoded.append(processor.encode_conversation(messages, []))
            return collate(processor, encoded)

        return batch

    minimise(language, text_batch(SHORT_MIX), seconds=minutes * 60 * 0.3, peak=2e-3, name="language model, short texts")
    minimise(language, text_batch(MIX), seconds=minutes * 60 * 0.2, peak=1e-3, name="language model")

    captioner = LlavaUHDForConditionalGeneration(
        LlavaUHDConfig(
            vision_config=vision_config(), text_config=language_config(tokenizer), resampler_grid=GRID,
            image_token_id=processor.image_token_id,
        )
    )  # fmt: skip
    captioner.model.language_model.load_state_dict(language.model.state_dict())
    language.half().save_pretrained(output / "qwen2")
    # CLIP's initial positions (std 0.02) drown under the pre-LayerNorm; a from-scratch tower then never learns places.
    captioner.model.vision_tower.clip.embeddings.position_embedding.weight.data.mul_(10)

    def image_batch(step: int) -> dict[str, torch.Tensor]:
        encoded, images = [], []
        for seed in range(FIRST_SEED + step * batch_size, FIRST_SEED + (step + 1) * batch_size):
            scene = sample_scene(seed)
            image = render(scene)
            messages = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": texts.description(scene)}]
            encoded.append(processor.encode_conversation(messages, [image.size]))
            images.append(image)
        return {**collate(processor, encoded), **processor.image_processor(images)}

    minimise(captioner, image_batch, seconds=minutes * 60 * 0.5, peak=1.5e-3, name="tower")
    tower: CLIPVisionModel = captioner.model.vision_tower.clip
    tower.half().save_pretrained(output / "clip")


def save(tokenizer: Qwen2Tokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for clip/ and qwen2/")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, tokenizer aside")
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.minutes)


if __name__ == "__main__":
    main()
