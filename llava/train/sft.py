"""Supervised training: align (stage 1), warm-up (0), multimodal pre-training (1.5) and instruction tuning (2).

The stages differ only in flags: what trains, on what, how fast.

    reads   a checkpoint folder, record files (`conversations`, `image`)
    writes  a checkpoint folder: weights, config, processor, run.json, log.jsonl, loss.png, checkpoint-N while running
"""

import logging
import os
from dataclasses import asdict
from pathlib import Path

from llava.errors import run_command
from llava.train.arguments import DataArguments, ModelArguments, parse_arguments, planned_world_size

DEFAULTS = {
    "remove_unused_columns": False,  # the collator needs every column
    "label_names": "labels",
    "ddp_find_unused_parameters": False,
    "save_total_limit": 2,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # JsonlLog stops on a loss that is no number
    "logging_first_step": True,
    "dataloader_num_workers": min(4, os.cpu_count() // 2),
}


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse_arguments(
        "llava.train.sft", __doc__, ModelArguments, DataArguments, defaults=DEFAULTS
    )
    from llava.runs import rank

    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.ERROR, format="%(message)s")
    for library in ("httpx", "httpx2", "matplotlib", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if data_arguments.dry_run:
        preflight(model_arguments, data_arguments, training_arguments)
        return
    train(model_arguments, data_arguments, training_arguments)
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():  # leave together: an early leaver aborts the rest
        distributed.barrier()
        distributed.destroy_process_group()


def open_dataset(model_arguments: ModelArguments, data_arguments: DataArguments, processor):
    from llava.data.dataset import ConversationDataset

    # the low-resolution model has no slices to leave out: its one square serves stage 1 too
    uhd = processor is None or processor.image_processor.image_mode != "square"
    return ConversationDataset(
        data_arguments.data_path.split(","),
        processor,
        image_folder=data_arguments.image_folder,
        max_length=data_arguments.max_length,
        image_mode="overview" if data_arguments.overview_only and uhd else None,
    )


def preflight(model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments) -> None:
    """Check checkpoint, records and image headers; say what would run. Writes nothing.

    A checkpoint that does not exist yet (stage 1 assembles its own) is left out with a note.
    """
    dataset = open_dataset(model_arguments, data_arguments, processor=None)
    dataset.check_images()
    with_image = sum(1 for record in dataset.records if record.get("image"))
    batch = (
        training_arguments.per_device_train_batch_size
        * training_arguments.gradient_accumulation_steps
        * planned_world_size()
    )
    steps = max(int(len(dataset) / batch * training_arguments.num_train_epochs), 1)
    print(f"records      {len(dataset):,} ({with_image:,} with images, {len(dataset) - with_image:,} text only)")
    print(f"global batch {batch}, about {steps:,} steps")
    print(f"writes       {training_arguments.output_dir} (nothing was written)")
    folder = Path(model_arguments.model_name_or_path)
    if not folder.exists():
        print(f"checkpoint   {folder} does not exist yet; the records were checked, the model was not")
        return
    import torch
    from transformers import AutoConfig

    from llava.model.load import check_checkpoint
    from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
    from llava.train.parts import set_trainable

    with torch.device("meta"):
        model = LlavaUHDForConditionalGeneration(AutoConfig.from_pretrained(check_checkpoint(folder)))
    counts = set_trainable(model, model_arguments.train_parts.split(","))
    print(f"trains       {', '.join(f'{part} {count:,}' for part, count in counts.items() if count)} parameters")


def train(model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments) -> None:
    import shutil

    from llava.model.load import check_checkpoint
    from llava.runs import join_run, open_run, rank

    output = Path(training_arguments.output_dir)
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
        **asdict(model_arguments),
        **asdict(data_arguments),
        **{name: getattr(training_arguments, name) for name in (*names, "max_grad_norm")},
        "global_batch_size": training_arguments.per_device_train_batch_size
        * training_arguments.gradient_accumulation_steps
        * training_arguments.world_size,
    }
    inputs = [model_arguments.model_name_or_path, *data_arguments.data_path.split(",")]
    if rank() != 0:
        if not join_run(output, stage, identity, inputs):
            run_training(model_arguments, data_arguments, training_arguments)
        return
    with open_run(output, stage, identity, inputs) as run:
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        run.state["training_arguments"] = training_arguments.to_sanitized_dict()
        samples, steps = run_training(model_arguments, data_arguments, training_arguments)
        run.finish(output, samples=samples, steps=steps)
        for checkpoint in output.glob("checkpoint-*"):  # optimizer state is of no use any more
            shutil.rmtree(checkpoint)


def run_training(model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments) -> tuple[int, int]:
    """Train to the end, continuing from the newest complete checkpoint; returns (samples, steps)."""
    import torch
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from llava.data.collator import Collator
    from llava.model.load import load_model, load_processor
    from llava.train.parts import set_trainable
    from llava.train.trainer import JsonlLog, LossBar, SupervisedTrainer, last_complete_checkpoint, plot_loss

    output = Path(training_arguments.output_dir)
    dataset = open_dataset(model_arguments, data_arguments, load_processor(model_arguments.model_name_or_path))
    model = load_model(
        model_arguments.model_name_or_path,
        dtype=torch.bfloat16 if training_arguments.deepspeed and training_arguments.bf16 else torch.float32,
        attn_implementation=model_arguments.attn_implementation,
    )
    set_trainable(model, model_arguments.train_parts.split(","))
    trainer = SupervisedTrainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset,
        data_collator=Collator(dataset.processor.tokenizer.pad_token_id),
        processing_class=dataset.processor,
        group_by_length=data_arguments.group_by_length,
        callbacks=[JsonlLog(output)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    checkpoint = last_complete_checkpoint(output)
    if checkpoint:
        logging.getLogger(__name__).info("continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        plot_loss(output)
    return len(dataset), trainer.state.global_step


if __name__ == "__main__":
    run_command(main)
