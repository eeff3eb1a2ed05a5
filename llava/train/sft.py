"""Supervised training: align (stage 1), warm-up (0), multimodal pre-training (1.5) and instruction tuning (2).

The stages differ only in flags: what trains, on what, how fast.

    reads   a checkpoint folder, record files (`conversations`, `image`)
    writes  a checkpoint folder: weights, config, processor, run.json, log.jsonl, loss.png, checkpoint-N while running
"""

from pathlib import Path

from llava.errors import run_command
from llava.train.arguments import DataArguments, ModelArguments, planned_world_size
from llava.train.stage import (
    attend_within_samples,
    carry_on,
    measured_sizes,
    open_model,
    pack_sampler,
    planned_model,
    run_stage,
    work_of_patch,
    write_preflight,
)


def main() -> None:
    run_stage("llava.train.sft", __doc__, (ModelArguments, DataArguments), preflight, run_training, inputs)


def inputs(model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments) -> list[str]:
    return [model_arguments.model_name_or_path, *data_arguments.data_path.split(",")]


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
    from llava.train.preflight import batch_line, report

    folder = Path(model_arguments.model_name_or_path)
    if not folder.exists():
        dataset = open_dataset(model_arguments, data_arguments, processor=None)
        dataset.check_images()
        print(f"records      {len(dataset):,}; every image header was read")
        print(batch_line(len(dataset), training_arguments, planned_world_size()))
        print(f"checkpoint   {folder} does not exist yet; the records were checked, the model was not")
        print(f"writes       {training_arguments.output_dir} (nothing was written)")
        return
    from llava.model.load import load_processor

    model = planned_model(model_arguments)
    dataset = open_dataset(model_arguments, data_arguments, load_processor(folder))
    sizes, world = dataset.sizes(), planned_world_size()
    costs = sample_costs(model, dataset, sizes)
    packs = pack_sampler(costs, training_arguments, rank=0, world=world) if data_arguments.packing else None
    for line in report(dataset, sizes, packs, model, training_arguments, world, model_arguments.four_bit):
        print(line)
    print(f"writes       {training_arguments.output_dir} (nothing was written)")


def run_training(model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments) -> tuple[int, int]:
    """Train to the end, continuing from the newest complete checkpoint; returns (samples, steps)."""
    from llava.data.collator import Collator
    from llava.model.load import load_processor
    from llava.train.preflight import report
    from llava.train.trainer import JsonlLog, SupervisedTrainer

    output = Path(training_arguments.output_dir)
    dataset = open_dataset(model_arguments, data_arguments, load_processor(model_arguments.model_name_or_path))
    model, lora = open_model(model_arguments, training_arguments)
    sizes = measured_sizes(dataset, training_arguments)
    world, packs = training_arguments.world_size, None
    if data_arguments.packing:
        costs = sample_costs(model, dataset, sizes)
        packs = pack_sampler(costs, training_arguments, training_arguments.process_index, world)
        attend_within_samples(model)
    if training_arguments.process_index == 0:
        four_bit = model_arguments.four_bit
        write_preflight(output, report(dataset, sizes, packs, model, training_arguments, world, four_bit))
    trainer = SupervisedTrainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset,
        data_collator=Collator(dataset.processor.tokenizer.pad_token_id, data_arguments.packing),
        processing_class=dataset.processor,
        packs=packs,
        save_trained_only=bool(lora),
        callbacks=[JsonlLog(output)],
    )
    carry_on(trainer, lora, model_arguments)
    return len(dataset), trainer.state.global_step


def sample_costs(model, dataset, sizes) -> list[float]:
    """Work of every sample in tokens."""
    tokens = sizes[:, :2].sum(1).clip(max=dataset.max_length)
    return (tokens + sizes[:, 2] * work_of_patch(model)).tolist()


if __name__ == "__main__":
    run_command(main)
