"""A training stage: the run folder around it, the model opened, the training carried to its end, the result written.

What a stage learns from, and by which loss, is in `sft.py` and `dpo.py`.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.train.arguments import ModelArguments, parse_arguments

DEFAULTS = {
    "remove_unused_columns": False,  # the collator needs every column
    "label_names": "labels",
    "ddp_find_unused_parameters": False,
    "save_total_limit": 2,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # the trainer's guard stops on a loss that is no number
    "logging_first_step": True,
    "dataloader_num_workers": min(4, os.cpu_count() // 2),
}


Arguments = tuple[Any, ...]  # ModelArguments, the stage's own, TrainingArguments


def run_stage(
    module: str,
    description: str,
    groups: tuple[type, ...],
    check: Callable[..., None],
    work: Callable[..., tuple[int, int]],
    inputs: Callable[..., list[str]],
) -> None:
    """The command of a stage.

    Args:
        groups: dataclasses of our flags; the first is ModelArguments, the second has `dry_run`.
        check: the dry run; gets the parsed groups and the TrainingArguments.
        work: trains; gets the same, returns (samples, steps).
        inputs: gets the same, returns the files whose fingerprints belong to the run.
    """
    arguments = parse_arguments(module, description, *groups, defaults=DEFAULTS)
    from llava.runs import PREEMPTED, Preempted, rank

    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.ERROR, format="%(message)s")
    for library in ("httpx", "httpx2", "matplotlib", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if arguments[1].dry_run:
        check(*arguments)
        return
    from llava.train.trainer import Preemption

    Preemption()  # from here on a signal is noted
    try:
        train(arguments, work, inputs(*arguments))
    except Preempted as preempted:
        print(f"asked to leave; {preempted}. The same command continues there", file=sys.stderr)
        sys.exit(PREEMPTED)
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():  # leave together: an early leaver aborts the rest
        distributed.barrier()
        distributed.destroy_process_group()


def train(arguments: Arguments, work: Callable[..., tuple[int, int]], inputs: list[str]) -> None:
    """The stage in its run folder: found complete, continued, or begun."""
    import shutil
    from dataclasses import asdict

    from llava.model.load import check_checkpoint
    from llava.runs import join_run, open_run, rank

    model_arguments, *own, training_arguments = arguments
    output = Path(training_arguments.output_dir)
    check_engine(model_arguments, training_arguments)
    check_checkpoint(model_arguments.model_name_or_path)
    stage = f"train {output.name}"
    names = (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "seed",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
    )
    identity = {
        **{name: value for group in (model_arguments, *own) for name, value in asdict(group).items()},
        **{name: getattr(training_arguments, name) for name in (*names, "max_grad_norm")},
        "global_batch_size": training_arguments.per_device_train_batch_size
        * training_arguments.gradient_accumulation_steps
        * training_arguments.world_size,
    }
    del identity["recompute"]  # changes memory and time alone, and may be changed when memory ran out
    if rank() != 0:
        if not join_run(output, stage, identity, inputs):
            work(*arguments)
        return
    with open_run(output, stage, identity, inputs) as run:
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        run.state["training_arguments"] = training_arguments.to_sanitized_dict()
        samples, steps = work(*arguments)
        run.finish(output, samples=samples, steps=steps)
        if training_arguments.save_total_limit == DEFAULTS["save_total_limit"]:  # more were not asked for
            for checkpoint in output.glob("checkpoint-*"):  # optimizer state is of no use any more
                shutil.rmtree(checkpoint)


def check_engine(model_arguments: ModelArguments, training_arguments) -> None:
    """Refuse combinations that would quietly do something else."""
    import torch

    if training_arguments.fsdp and not torch.cuda.is_available():
        raise UserError(
            "--fsdp works on GPUs alone; on a CPU accelerate would quietly run plain data parallelism. "
            "Fix: drop it, or use --deepspeed"
        )
    if model_arguments.lora_rank and training_arguments.deepspeed and training_arguments.hf_deepspeed_config.is_zero3():
        raise UserError("--lora_rank cannot be merged under ZeRO-3. Fix: DEEPSPEED_CONFIG=training_scripts/zero2.json")
    if model_arguments.lora_rank and training_arguments.fsdp:
        raise UserError("--lora_rank does not go with --fsdp. Fix: DEEPSPEED_CONFIG=training_scripts/zero2.json")
    if model_arguments.four_bit and not model_arguments.lora_rank:
        raise UserError(
            "--four_bit alone has nothing to train: 4-bit weights stay as they are. Fix: add --lora_rank 16"
        )
    if model_arguments.four_bit and (training_arguments.deepspeed or training_arguments.fsdp):
        raise UserError("--four_bit runs without DeepSpeed and FSDP. Fix: DEEPSPEED_CONFIG=none")
    if model_arguments.recompute not in ("selective", "full"):
        raise UserError(f"--recompute {model_arguments.recompute!r} is neither selective nor full")


def planned_model(model_arguments: ModelArguments):
    """The model as it will train, without its weights: for a dry run."""
    import torch
    from transformers import AutoConfig

    from llava.model.load import check_checkpoint
    from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
    from llava.train.parts import set_trainable

    config = AutoConfig.from_pretrained(check_checkpoint(model_arguments.model_name_or_path))
    with torch.device("meta"):
        model = LlavaUHDForConditionalGeneration(config)
    set_trainable(model, model_arguments.train_parts.split(","))
    if model_arguments.lora_rank:
        lora_of(model, model_arguments)
    return model


def work_of_patch(model) -> float:
    """Work of a patch in tokens: as much less as the tower is smaller than the language model."""
    from llava.train.parts import numbers

    vision, language = (
        sum(map(numbers, part.parameters())) for part in (model.model.vision_tower, model.model.language_model)
    )
    return vision / language


def carry_on(trainer, lora, model_arguments: ModelArguments) -> None:
    """Train to the end, continuing from the newest complete checkpoint; then write the result and draw the loss.

    Raises Preempted when the run was asked to leave and has saved.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from llava.runs import Preempted
    from llava.train.trainer import LossBar, Preemption, last_complete_checkpoint, plot_loss

    output = Path(trainer.args.output_dir)
    preemption = Preemption()
    trainer.add_callback(preemption)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    checkpoint = last_complete_checkpoint(output)
    if checkpoint:
        logging.getLogger(__name__).info("continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if preemption.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Preempted(f"saved at step {trainer.state.global_step}")
    save_result(trainer, lora, model_arguments)
    if trainer.is_world_process_zero():
        plot_loss(output)


def write_preflight(output: Path, lines) -> None:
    """preflight.txt: where every variable came from, then these lines."""
    told = os.environ.get("LAUNCH_VARIABLES", "").splitlines()
    (output / "preflight.txt").write_text("".join(f"{line}\n" for line in [*told, *lines]))


def open_model(model_arguments: ModelArguments, training_arguments):
    """The model with its parts frozen, recomputation and kernels in place, and its LoRA additions (or None)."""
    import torch
    from transformers import set_seed

    from llava.model.load import load_model
    from llava.train.lora import four_bit
    from llava.train.parts import set_trainable
    from llava.train.recompute import checkpointing_kwargs

    if training_arguments.deepspeed:  # ZeRO-3 splits parameters while they are loaded, and must know its ranks by then
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    dtype = torch.bfloat16 if training_arguments.deepspeed and training_arguments.bf16 else torch.float32
    model = load_model(
        model_arguments.model_name_or_path,
        dtype=dtype,
        attn_implementation=model_arguments.attn_implementation,
        quantization_config=four_bit(torch.bfloat16 if training_arguments.bf16 else dtype)
        if model_arguments.four_bit
        else None,
    )
    set_trainable(model, model_arguments.train_parts.split(","))
    set_seed(training_arguments.seed)  # LoRA starts from random numbers
    lora = lora_of(model, model_arguments) if model_arguments.lora_rank else None
    if training_arguments.gradient_checkpointing:
        # with DeepSpeed 0.19's ZeRO-3, which replaces the linear function, keeping products gave other losses
        zero3 = training_arguments.deepspeed and training_arguments.hf_deepspeed_config.is_zero3()
        selective = model_arguments.recompute == "selective" and not zero3
        model.gradient_checkpointing_enable(checkpointing_kwargs(selective))
        training_arguments.gradient_checkpointing = False  # done; the Trainer would do it again, its own way
    if training_arguments.use_liger_kernel:
        fuse(model)
        training_arguments.use_liger_kernel = False  # done; the Trainer does not know the model
    return model, lora


def save_result(trainer, lora, model_arguments: ModelArguments) -> None:
    """Write the complete checkpoint, additions merged in."""
    import torch

    from llava.model.load import load_model
    from llava.train.lora import merge, merge_into

    if not model_arguments.four_bit:
        if lora:
            merge(lora)
        trainer.save_trained_only = False
        trainer.save_model()
    elif trainer.is_world_process_zero():
        whole = load_model(model_arguments.model_name_or_path, dtype=torch.float32)
        merge_into(whole, trainer.model.cpu())
        whole.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


def lora_of(model, arguments: ModelArguments):
    from llava.train.lora import add_lora

    return add_lora(model, arguments.lora_rank, arguments.lora_alpha or 2 * arguments.lora_rank, arguments.lora_dropout)


def pack_sampler(costs: list[float], training_arguments, rank: int, world: int):
    """Which samples train together, for this rank."""
    from llava.data.packing import PackSampler

    accumulation = training_arguments.gradient_accumulation_steps
    samples = training_arguments.per_device_train_batch_size * accumulation * world
    return PackSampler(costs, samples, accumulation, rank, world, training_arguments.seed)


def fuse(model) -> None:
    """Liger's fused kernels (arXiv 2410.10989) for the language model's layers and the loss."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise UserError(
            f"--use_liger_kernel: {error}. Fix: run `bash training_scripts/setup.sh train liger`"
        ) from error
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model.model.language_model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    model.lm_head.fused_loss = LigerFusedLinearCrossEntropyLoss(reduction="sum").forward  # a module would be registered


def attend_within_samples(model) -> None:
    """Let the language model read packed rows: through `packed_sdpa`, unless it has flash attention."""
    from llava.model.packed_attention import PACKED_SDPA

    text = model.model.language_model
    if text.config._attn_implementation != "flash_attention_2":
        text.config._attn_implementation = PACKED_SDPA


def measured_sizes(dataset, training_arguments):
    """`dataset.sizes()`, measured by rank 0 alone and kept in the output folder for the others and for a restart."""
    import numpy as np

    saved = Path(training_arguments.output_dir) / "sample_sizes.npy"
    with training_arguments.main_process_first(local=False, desc="measuring samples"):
        sizes = np.load(saved) if saved.is_file() else dataset.sizes(progress=training_arguments.process_index == 0)
        if training_arguments.process_index == 0 and not saved.is_file():
            partial = saved.with_suffix(".partial.npy")
            np.save(partial, sizes)
            partial.replace(saved)
    return sizes
