"""Speed and memory of a training step against the step of the published code, with equal loss and gradients.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.training

The straightforward step pads the samples to the longest, gives every position's logits over the whole vocabulary in
float32, and encodes one picture after another, padded and masked, through all layers of the tower. Ours is the model's
own packed step.
"""

import importlib.util
import inspect
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPVisionConfig, Qwen2Config, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import PrinterCallback

from llava.data.collator import Collator
from llava.data.packing import PackSampler
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.packed_attention import PACKED_SDPA
from llava.train.trainer import SupervisedTrainer
from tests.benchmarks.compare import compare, header

VOCABULARY = 152_064
IMAGE = 151_646


def build() -> LlavaUHDForConditionalGeneration:
    """Qwen2's vocabulary on four narrow layers, a two-layer tower."""
    torch.manual_seed(0)
    config = LlavaUHDConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, image_size=112,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=False,
        ),
        resampler_grid=4, resampler_heads=3, image_token_id=IMAGE,
    )  # fmt: skip
    return LlavaUHDForConditionalGeneration(config).train()


def samples(count: int = 4) -> list[dict]:
    """Conversations of ragged length about one square picture each; a quarter of the text is learned."""
    rng, made = random.Random(0), []
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        text = [rng.randrange(1000, 100_000) for _ in range(rng.choice((120, 180, 260, 420)))]
        learned = len(text) // 4
        ids = [1, *[IMAGE] * 16, *text]
        labels = [-100] * (len(ids) - learned) + text[-learned:]
        pixels = torch.randint(0, 256, (64, 588), dtype=torch.uint8, generator=generator)
        made.append({
            "id": str(number), "input_ids": ids, "labels": labels, "pixel_values": pixels,
            "slice_shapes": torch.tensor([[8, 8]]), "grids": torch.tensor([[0, 0]]),
        })  # fmt: skip
    return made


def batch_of(packing: bool) -> dict:
    batch = Collator(0, packing)(samples())
    batch.pop("ids")
    return batch


def packed_step(model, batch) -> torch.Tensor:
    model.model.language_model.config._attn_implementation = PACKED_SDPA
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def padded_step(model, batch) -> torch.Tensor:
    model.model.language_model.config._attn_implementation = "sdpa"
    model.zero_grad()
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    loss.backward()
    return loss.detach()


def bench_step(rounds: int = 3) -> float:
    model, padded, packed = build(), batch_of(False), batch_of(True)
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def straightforward() -> tuple:
        return padded_step(model, padded), gradients(model)

    def ours() -> tuple:
        model.model.language_model.gradient_checkpointing_disable()  # what the packed step saves in memory
        result = packed_step(model, packed), gradients(model)
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        return result

    def gradients(model) -> list[torch.Tensor]:
        return [p.grad.clone() for p in model.model.projector.parameters()] if check.first else []

    def check(one: tuple, other: tuple) -> None:
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
        for left, right in zip(one[1], other[1], strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-3)
        check.first = False

    check.first = True
    return compare("training step, vocabulary 152,064, 4 samples", straightforward, ours, check, rounds)


class AllLogits:
    """A model whose forward pass gives logits of every position, and the loss from them, as stock models do."""

    def __init__(self, model):
        self.model, self.forward = model, model.forward

    def __enter__(self):
        def forward(*args, labels=None, num_items_in_batch=None, **inputs):
            outputs = self.forward(*args, **inputs)
            if labels is not None:
                outputs.loss = ForCausalLMLoss(outputs.logits, labels, VOCABULARY, num_items_in_batch)
            return outputs

        forward.__signature__ = inspect.signature(self.forward)
        self.model.forward = forward
        self.model.model.language_model.config._attn_implementation = "sdpa"

    def __exit__(self, *_):
        self.model.forward = self.forward
        self.model.model.language_model.config._attn_implementation = PACKED_SDPA


def bench_trainers(steps: int = 2) -> dict[str, float]:
    """Whole trainers, from the first batch to the last update: transformers' and TRL's on padded rows, and ours."""
    model, data, folder = build(), samples(), tempfile.mkdtemp()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    common = {
        "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True,
        "label_names": ["labels"], "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "learning_rate": 1e-4,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip

    def padded(batch: list[dict]) -> dict:
        batch = Collator(0, packing=False)(batch)
        batch.pop("ids")
        return batch

    def stock() -> list[float]:
        arguments = TrainingArguments(**common, gradient_checkpointing=True)
        with AllLogits(model):
            return train(Trainer(model=model, args=arguments, train_dataset=data, data_collator=padded))

    def trl() -> list[float]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**common, gradient_checkpointing=True, dataset_kwargs={"skip_prepare_dataset": True})
        places = Dataset.from_dict({"place": list(range(len(data)))})
        tokenizer = AutoTokenizer.from_pretrained("llava/toy/weights/qwen2")  # asked for, not used
        with AllLogits(model):
            return train(SFTTrainer(
                model=model, args=arguments, train_dataset=places, processing_class=tokenizer,
                data_collator=lambda rows: padded([data[row["place"]] for row in rows]),
            ))  # fmt: skip

    def ours() -> list[float]:
        model.gradient_checkpointing_disable()  # what packing and the chunked loss save in memory
        arguments = TrainingArguments(**common, gradient_checkpointing=False)
        packs = PackSampler([len(sample["input_ids"]) for sample in data], 4, 1, 0, 1, seed=0)
        collator = Collator(0, packing=True)
        return train(
            SupervisedTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator, packs=packs)
        )

    def train(trainer) -> list[float]:
        model.load_state_dict(start)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    def check(one: list[float], other: list[float]) -> None:
        assert len(one) == len(other) == steps
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-4, rtol=1e-4)

    baselines = {"transformers' Trainer": stock}
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        baselines["TRL's SFTTrainer"] = trl
    ratios = {}
    for name, baseline in baselines.items():
        ratios[name] = compare(f"{steps} steps, against {name}", baseline, ours, check, rounds=2)
    return ratios


def bench_memory() -> float:
    """Peak memory of each step above the model itself, in processes of their own."""
    peaks = {}
    for kind in ("padded", "packed"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.training", kind], capture_output=True, text=True, check=True
        )
        peaks[kind] = float(done.stdout.split()[-1])
    ratio = peaks["packed"] / peaks["padded"]
    print(
        f"{'memory of that step above the weights':<44} {peaks['padded']:9.2f} GB {peaks['packed']:9.2f} GB  {ratio:5.2f}"
    )
    return ratio


def measure(kind: str) -> None:
    model = build()
    batch = batch_of(kind == "packed")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = kilobytes("VmRSS")
    (packed_step if kind == "packed" else padded_step)(model, batch)
    print((kilobytes("VmHWM") - before) / 1e6)


def kilobytes(name: str) -> int:
    """A line of /proc/self/status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


def fill() -> None:
    """Share of the work that does not wait for the largest pack, 32 ranks of 4 samples."""
    from tests.data.test_packing import STAGES, lengths_of

    for stage in STAGES:
        costs = [min(length, 4096) for length in lengths_of(stage, 128 * 40)]
        share = PackSampler(costs, 128, 1, 0, 32, seed=0).fill()
        print(f"{'packs of the stage ' + stage + ', 32 ranks x 4':<44} {share:6.1%} of the work is not waiting")


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    header()
    bench_step()
    bench_trainers()
    bench_memory()
    fill()


if __name__ == "__main__":
    main()
