"""Train the toy world's tokenizer, CLIP tower and language model from nothing.

    OMP_NUM_THREADS=1 python -m llava.toy.pretrain --output NEW --minutes 40

Real users start from pre-trained CLIP and Qwen2; the quickstart starts from these. The tokenizer is a byte-level BPE
with Qwen2's special tokens. The tower (CLIP layout) learns what every patch shows; the language model (Qwen2 layout)
learns to answer from facts in words; then both learn to answer about images together, through a projector that is
thrown away: a new one is then aligned in a few thousand images, as CLIP's and Qwen2's are. Scenes use seeds that the
world never uses. Both models are saved in float16, in the published folder layout.
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from llava.model.chat_templates import CHATML
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor, pad
from llava.prompts import ANSWER_SHORT, COD_HEADINGS, COT_HEADINGS, IMAGE, render_steps, tags_to_steps
from llava.toy import texts
from llava.toy.scenes import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    LETTERS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    outlines,
    render,
    sample_scene,
)  # fmt: skip
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
        initializer_range=0.08,  # Qwen2's 0.02 suits a width of thousands; here attention would hardly ever start
    )  # fmt: skip


def conversation(scene: Scene, rng: random.Random, opening: str) -> list[dict[str, str]]:
    """A description, perhaps, and then several questions about one scene, `opening` (its facts or its image) first."""
    pairs = []
    kind = rng.choices(("description", "steps", "short", "none"), (30, 10, 10, 50))[0]
    if kind == "description":
        pairs.append((rng.choice(CAPTION_QUESTIONS), texts.description(scene)))
    elif kind == "steps":
        pairs.append((rng.choice(CAPTION_QUESTIONS), render_steps(COD_HEADINGS, texts.description_steps(scene))))
    elif kind == "short":
        pairs.append((rng.choice(ALIGN_QUESTIONS), texts.short_caption(scene)))
    questions = texts.questions(scene, rng) + texts.questions(scene, rng)
    for question in rng.sample(questions, min(6, len(questions))):
        form = rng.random()
        if form < 0.08:
            steps = tags_to_steps(texts.tagged_reasoning(scene, question))
            pairs.append((question.text, render_steps(COT_HEADINGS, steps)))
        elif form < 0.2 and len(question.options) > 2:
            pairs.append(texts.lettered(question, rng))
        elif form < 0.5:
            pairs.append((f"{question.text}\n{ANSWER_SHORT}", question.answer))
        else:
            pairs.append((question.text, question.answer))  # short, so that a batch holds more questions
    pairs[0] = (f"{opening}\n{pairs[0][0]}", pairs[0][1])
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def text_only(rng: random.Random) -> list[dict[str, str]]:
    question, answer = texts.text_only(rng)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE over the world's language, Qwen2's three special tokens, ChatML template."""
    corpus = ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 100
    for seed in range(FIRST_SEED, FIRST_SEED + 2000):
        scene, rng = sample_scene(seed), random.Random(f"tokenizer/{seed}")
        turns = conversation(scene, rng, texts.facts(scene)) + text_only(rng)
        corpus += [turn["content"] for turn in turns]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=VOCABULARY - 4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def minimise(parameters, loss_of, minutes: float, peak: float, name: str) -> None:
    """AdamW with warm-up and cosine over wall-clock time; clips gradients at 1. `loss_of(step)` is a scalar tensor."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, mean = time.time(), 0, None
    while (progress := (time.time() - start) / (minutes * 60)) < 1:
        rate = peak * min((step + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{name} {progress:4.0%} step {step} loss {mean:.4f}", flush=True)


def batches(processor: LlavaUHDProcessor, with_images: bool, size: int):
    """step -> a training batch of `size` conversations, about images or about facts in words."""

    def batch(step: int) -> dict[str, torch.Tensor]:
        encoded, images = [], []
        for seed in range(FIRST_SEED + step * size, FIRST_SEED + (step + 1) * size):
            scene, rng = sample_scene(seed), random.Random(f"conversation/{seed}")
            if rng.random() < 0.05:
                encoded.append(processor.encode_conversation(text_only(rng), []))
            elif with_images:
                images.append(render(scene))
                messages = conversation(scene, rng, IMAGE)
                encoded.append(processor.encode_conversation(messages, [images[-1].size]))
            else:
                encoded.append(processor.encode_conversation(conversation(scene, rng, texts.facts(scene)), []))
        joined = pad([ids for ids, _ in encoded], processor.tokenizer.pad_token_id, "right")
        joined["labels"] = pad([labels for _, labels in encoded], -100, "right")["input_ids"]
        return {**joined, **processor.image_processor(images)} if images else joined

    return batch


class PatchClasses(torch.nn.Module):
    """What each patch shows, read from its feature by linear layers: the tower's task before it meets words.

    A real CLIP's patch features already say what is where; a tower that learns from captions alone takes far longer.
    """

    def __init__(self, width: int):
        super().__init__()
        self.values = {
            "kind": [*BACKGROUNDS, "thing", "printed"], "color": list(COLORS), "shape": list(SHAPES),
            "size": list(SIZES), "texture": list(TEXTURES), "printed": list(LETTERS + DIGITS),
        }  # fmt: skip
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(values)) for name, values in self.values.items()}
        )

    def targets(self, scene: Scene, image_processor: LlavaUHDImageProcessor) -> dict[str, torch.Tensor]:
        """For each head the class of every patch of the scene's slices, -100 where there is none."""
        patch = image_processor.patch_size
        coverage = []
        for mask in outlines(scene):
            pieces = [np.asarray(piece, dtype=np.float32) / 255 for piece in image_processor.cut(mask)]
            cells = [p.reshape(len(p) // patch, patch, p.shape[1] // patch, patch).mean((1, 3)) for p in pieces]
            coverage.append(np.concatenate([cell.ravel() for cell in cells]))
        owner = np.where(np.max(coverage, axis=0) > 0.2, np.argmax(coverage, axis=0), -1)
        labels = {name: np.full(len(owner), -100) for name in self.values}
        labels["kind"][:] = self.values["kind"].index(scene.background)
        for index, thing in enumerate(scene.things):
            labels["kind"][owner == index] = self.values["kind"].index("thing")
            for name in ("color", "shape", "size", "texture"):
                labels[name][owner == index] = self.values[name].index(getattr(thing, name))
        if scene.printed:
            labels["kind"][owner == len(scene.things)] = self.values["kind"].index("printed")
            labels["printed"][owner == len(scene.things)] = self.values["printed"].index(scene.printed)
        return {name: torch.from_numpy(label) for name, label in labels.items()}

    def loss(self, tower, image_processor: LlavaUHDImageProcessor, scenes: list[Scene]) -> torch.Tensor:
        batch = image_processor([render(scene) for scene in scenes])
        features = tower(batch["pixel_values"], [tuple(shape) for shape in batch["slice_shapes"].tolist()])
        targets = [self.targets(scene, image_processor) for scene in scenes]
        losses = []
        for name, head in self.heads.items():
            labels = torch.cat([target[name] for target in targets])
            if (labels >= 0).any():
                losses.append(F.cross_entropy(head(features), labels))
        return torch.stack(losses).sum()


def pretrain(output: Path, minutes: float, batch_size: int = 16) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(output / "qwen2")
    with_image = Qwen2Tokenizer.from_pretrained(output / "qwen2")
    with_image.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    image_processor = LlavaUHDImageProcessor(resolution=RESOLUTION, patch_size=PATCH)
    processor = LlavaUHDProcessor(image_processor, with_image, chat_template=CHATML, resampler_grid=GRID)
    model = LlavaUHDForConditionalGeneration(
        LlavaUHDConfig(
            vision_config=vision_config(), text_config=language_config(tokenizer), resampler_grid=GRID,
            image_token_id=processor.image_token_id,
        )
    )  # fmt: skip
    tower, language = model.model.vision_tower, model.model.language_model
    # CLIP's initial positions (std 0.02) drown under the pre-LayerNorm; a from-scratch tower then never learns places.
    tower.clip.embeddings.position_embedding.weight.data.mul_(10)

    classes = PatchClasses(tower.config.hidden_size)

    def patches(step: int) -> torch.Tensor:
        first = FIRST_SEED + step * 2 * batch_size
        return classes.loss(tower, image_processor, [sample_scene(first + index) for index in range(2 * batch_size)])

    minimise([*tower.parameters(), *classes.parameters()], patches, 0.25 * minutes, 2e-3, "tower")
    words = batches(processor, with_images=False, size=batch_size)
    minimise(language.parameters(), lambda step: model.train()(**words(step)).loss, 0.25 * minutes, 2e-3, "language")
    seen = batches(processor, with_images=True, size=batch_size)
    minimise(model.parameters(), lambda step: model(**seen(step)).loss, 0.5 * minutes, 1e-3, "together")

    tower.clip.half().save_pretrained(output / "clip")
    causal = Qwen2ForCausalLM(language_config(tokenizer))
    causal.model.load_state_dict(language.state_dict())
    causal.half().save_pretrained(output / "qwen2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for clip/ and qwen2/")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time, tokenizer aside")
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.minutes)


if __name__ == "__main__":
    main()
