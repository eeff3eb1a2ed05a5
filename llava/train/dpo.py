"""Preference training (DPO): the same checkpoint learns to find one answer likelier than another.

The published code applies it to the warmed-up generators, before they generate (paper, DPO variants). The reference is
the checkpoint the run starts from, or --reference_model; its log-probabilities are computed once, before training, so
that one model is in memory at a time.

    reads   a checkpoint folder, pairs of quality_evaluation.pairs
    writes  a checkpoint folder as llava.train.sft does; log.jsonl with rewards, margins and accuracies, preference.png
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava.errors import run_command
from llava.train.arguments import ModelArguments, flag, planned_world_size
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


@dataclass
class PairArguments:
    """What it is trained on."""

    data_path: str = flag("files of pairs, comma-separated, see quality_evaluation.pairs")
    image_folder: str | None = flag("root of the pairs' image paths; default: each file's own folder", None)
    max_length: int = flag("longest sequence in tokens, image tokens included", 4096)
    global_batch_size: int | None = flag("pairs per optimizer step over all GPUs; derives the accumulation", None)
    packing: bool = flag("sequences of a batch side by side in one row, balanced over ranks; off: padded rows", True)
    dry_run: bool = flag("check arguments and data, report what would happen, touch nothing", False)


@dataclass
class PreferenceArguments:
    """What is minimised: alpha * preference loss + gamma * loss of the chosen answers."""

    loss: str = flag("sigmoid (DPO), ipo, or sigmoid_norm (DPO on log-probabilities per token)", "sigmoid")
    beta: float = flag("how strongly the model is held to the reference", 0.1)
    label_smoothing: float = flag("share of pairs whose sides are taken to be swapped (conservative DPO)", 0.0)
    alpha: float = flag("weight of the preference loss", 1.0)
    gamma: float = flag("weight of the chosen answers' own loss; 0: DPO alone", 1.0)
    reference_model: str | None = flag("checkpoint folder of the reference; default: where training starts", None)


def settings_of(arguments: PreferenceArguments):
    from llava.train.preference import PreferenceSettings

    return PreferenceSettings(
        arguments.loss, arguments.beta, arguments.label_smoothing, arguments.alpha, arguments.gamma
    )


def main() -> None:
    run_stage(
        "llava.train.dpo",
        __doc__,
        (ModelArguments, PairArguments, PreferenceArguments),
        preflight,
        run_training,
        inputs,
    )


def inputs(model_arguments, pair_arguments, preference_arguments, training_arguments) -> list[str]:
    reference = [preference_arguments.reference_model] if preference_arguments.reference_model else []
    return [model_arguments.model_name_or_path, *pair_arguments.data_path.split(","), *reference]


def open_pairs(pair_arguments: PairArguments, processor):
    from llava.data.preference import PairDataset

    paths = pair_arguments.data_path.split(",")
    return PairDataset(paths, processor, pair_arguments.image_folder, pair_arguments.max_length)


def lines(dataset, sizes, packs, model, model_arguments, settings, training_arguments, world: int) -> Iterator[str]:
    """The preflight's lines: of the pairs, then of both sides as samples."""
    from llava.train.preflight import batch_line, label_lines, model_lines, token_lines

    shown = sum(1 for pair in dataset.pairs if pair.get("image"))
    learned = sizes[:, 0].reshape(-1, 2)
    yield f"pairs        {len(dataset):,} ({shown:,} with images)"
    yield f"chosen       has more text in {(learned[:, 0] > learned[:, 1]).mean():.1%} of the pairs, less in {(learned[:, 0] < learned[:, 1]).mean():.1%}"
    yield f"objective    {settings.alpha:g} x {settings.loss} (beta {settings.beta:g}) + {settings.gamma:g} x loss of the chosen answer"
    yield from token_lines(dataset.sides, sizes)
    yield from label_lines(dataset.sides)
    yield batch_line(len(dataset), training_arguments, world)
    if packs:
        yield f"packs        {packs.fill():.1%} of the work is not waiting for the largest pack"
    sizes = sizes.copy()
    sizes[1::2, 2] = 0  # a pair's patches are encoded once
    yield from model_lines(model, sizes, training_arguments, world, model_arguments.four_bit)


def preflight(model_arguments, pair_arguments, preference_arguments, training_arguments) -> None:
    """Check checkpoint, pairs and image headers; say what would run. Writes nothing."""
    from llava.model.load import check_checkpoint, load_processor

    settings = settings_of(preference_arguments)
    folder = Path(model_arguments.model_name_or_path)
    if not folder.exists():
        dataset = open_pairs(pair_arguments, processor=None)
        dataset.check_images()
        print(f"pairs        {len(dataset):,}; every image header was read")
        print(f"checkpoint   {folder} does not exist yet; the pairs were checked, the model was not")
        return
    if preference_arguments.reference_model:
        check_checkpoint(preference_arguments.reference_model)
    model = planned_model(model_arguments)
    dataset = open_pairs(pair_arguments, load_processor(folder))
    sizes, world = dataset.sides.sizes(), planned_world_size()
    packs = None
    if pair_arguments.packing:
        packs = pack_sampler(dataset.costs(sizes, work_of_patch(model)), training_arguments, rank=0, world=world)
    for line in lines(dataset, sizes, packs, model, model_arguments, settings, training_arguments, world):
        print(line)
    print(f"writes       {training_arguments.output_dir} (nothing was written)")


def run_training(model_arguments, pair_arguments, preference_arguments, training_arguments) -> tuple[int, int]:
    """Reference log-probabilities, then training to the end; returns (pairs, steps)."""
    from llava.data.preference import PairCollator
    from llava.model.load import load_processor
    from llava.train.preference_trainer import PreferenceTrainer, plot_preference
    from llava.train.reference import reference_log_probs
    from llava.train.trainer import JsonlLog

    settings, output = settings_of(preference_arguments), Path(training_arguments.output_dir)
    dataset = open_pairs(pair_arguments, load_processor(model_arguments.model_name_or_path))
    sizes = measured_sizes(dataset.sides, training_arguments)
    collator = PairCollator(dataset.sides.processor.tokenizer.pad_token_id, pair_arguments.packing)
    reference = preference_arguments.reference_model or model_arguments.model_name_or_path
    dataset.reference = reference_log_probs(reference, dataset, collator, sizes, model_arguments, training_arguments)
    model, lora = open_model(model_arguments, training_arguments)
    world, packs = training_arguments.world_size, None
    if pair_arguments.packing:
        costs = dataset.costs(sizes, work_of_patch(model))
        packs = pack_sampler(costs, training_arguments, training_arguments.process_index, world)
        attend_within_samples(model)
    if training_arguments.process_index == 0:
        told = lines(dataset, sizes, packs, model, model_arguments, settings, training_arguments, world)
        write_preflight(output, told)
    trainer = PreferenceTrainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=dataset.sides.processor,
        packs=packs,
        settings=settings,
        save_trained_only=bool(lora),
        callbacks=[JsonlLog(output)],
    )
    carry_on(trainer, lora, model_arguments)
    if trainer.is_world_process_zero():
        plot_preference(output)
    return len(dataset), trainer.state.global_step


if __name__ == "__main__":
    run_command(main)
