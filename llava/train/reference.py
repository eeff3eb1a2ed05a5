"""Log-probabilities of all answers under the reference model, computed once, before a preference run.

Every rank takes a share and appends it to `reference/<precision>/shard-<rank>.jsonl` in the run's folder; a run that is started
again, with any number of ranks, computes what no shard holds. The reference model is gone before the other is loaded.
"""

import gc
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llava.data.preference import PairCollator, PairDataset
from llava.records import RecordAppender, read_jsonl
from llava.runs import Preempted, rank, world_size
from llava.train.arguments import ModelArguments
from llava.train.preference_trainer import answer_log_probs
from llava.train.stage import attend_within_samples
from llava.train.trainer import Preemption


def reference_log_probs(
    checkpoint: str,
    dataset: PairDataset,
    collator: PairCollator,
    sizes: np.ndarray,
    model_arguments: ModelArguments,
    arguments,
) -> np.ndarray:
    """(pairs, 2) float64: log-probability of the chosen and the rejected answer of every pair, in nats.

    Args:
        sizes: of `dataset.sides.sizes()`; pairs of similar length go through the model together.
        arguments: the TrainingArguments; precision and device are the training's own, so that training starts at a
            margin of 0 (Liger's kernels, where they train, are not in the reference).

    Raises:
        Preempted: asked to leave; what is computed is kept.
    """
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    shards = Path(arguments.output_dir) / "reference" / precision
    done = {line["id"] for path in shards.glob("shard-*.jsonl") for line in read_jsonl(path)}
    tokens = sizes[:, :2].sum(1).reshape(-1, 2).sum(1)
    order = sorted(range(len(dataset)), key=lambda index: -tokens[index])
    mine = [index for index in order[rank() :: world_size()] if dataset.pairs[index]["id"] not in done]
    if mine:
        with open_reference(checkpoint, model_arguments, arguments) as model:
            compute(model, dataset, collator, mine, shards / f"shard-{rank():05d}.jsonl", arguments)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return gathered(dataset, shards)


@contextmanager
def open_reference(checkpoint: str, model_arguments: ModelArguments, arguments):
    """The reference model, whole on this rank's device; DeepSpeed's splitting of parameters is off while it lives."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    from llava.model.load import load_model
    from llava.train.lora import four_bit

    if arguments.deepspeed:
        unset_hf_deepspeed_config()
    try:
        dtype = torch.bfloat16 if arguments.deepspeed and arguments.bf16 else torch.float32
        quantised = four_bit(torch.bfloat16 if arguments.bf16 else dtype) if model_arguments.four_bit else None
        model = load_model(
            checkpoint, dtype, attn_implementation=model_arguments.attn_implementation, quantization_config=quantised
        )
        if quantised is None:
            model.to(arguments.device)
        yield model.eval()
    finally:
        if arguments.deepspeed:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)


@torch.no_grad()
def compute(model, dataset: PairDataset, collator: PairCollator, mine: list[int], path: Path, arguments) -> None:
    from torch.utils.data import DataLoader

    if collator.collate.packing:
        attend_within_samples(model)
    loader = DataLoader(
        dataset, batch_size=arguments.per_device_train_batch_size, sampler=mine, collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
    )  # fmt: skip
    mixed = (arguments.bf16 or arguments.fp16) and not arguments.deepspeed
    half = torch.bfloat16 if arguments.bf16 else torch.float16
    autocast = torch.autocast(arguments.device.type, half) if mixed else nullcontext()
    bar = tqdm(total=len(mine), desc="reference", unit="pair", disable=rank() != 0)
    with RecordAppender(path) as shard, bar, autocast:
        for batch in loader:
            ids = batch.pop("ids")
            batch.pop("reference")
            batch = {name: value.to(arguments.device) for name, value in batch.items()}
            answers, _ = answer_log_probs(model, batch)
            for identifier, (chosen, rejected) in zip(ids, answers.view(-1, 2).tolist(), strict=True):
                shard.append({"id": identifier, "chosen": chosen, "rejected": rejected})
            bar.update(len(ids))
            leave_if_asked()


def leave_if_asked() -> None:
    if Preemption.asked:
        raise Preempted("the reference answers so far are kept")


def gathered(dataset: PairDataset, shards: Path) -> np.ndarray:
    """All ranks' answers, once all are there."""
    from llava.generate.job import wait_for_ranks

    wait_for_ranks(shards, len(dataset), leave_if_asked)
    known = {
        line["id"]: (line["chosen"], line["rejected"])
        for path in sorted(shards.glob("shard-*.jsonl"))
        for line in read_jsonl(path)
    }
    return np.array([known[pair["id"]] for pair in dataset.pairs], dtype=np.float64)
