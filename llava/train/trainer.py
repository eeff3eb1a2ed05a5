"""transformers' Trainer with what SICOG's stages need besides: packs, a log people can read, complete resume.

Distribution, precision, checkpoints and reporting are the Trainer's own.
"""

import json
import logging
import math
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from llava.data.packing import PackSampler
from llava.errors import UserError
from llava.records import RecordAppender, read_jsonl, write_json, write_records

logger = logging.getLogger(__name__)


# accelerate calls a rank's CPU `cpu:0`, which torch.load does not know: resuming on several CPU ranks would fail
torch.serialization.register_package(
    9, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class SupervisedTrainer(Trainer):
    """Trainer over a ConversationDataset.

    Args:
        packs: which samples train together; None for the Trainer's own random order of padded batches.
        save_trained_only: checkpoints leave out what does not train (LoRA); the rest is where the run started from.
    """

    def __init__(self, *args, packs: PackSampler | None, save_trained_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.packs = packs
        self.save_trained_only = save_trained_only
        self.add_callback(EpochOrder(self))
        self.add_callback(EngineCheck(self))
        self.guard = Guard(Path(self.args.output_dir))
        self.add_callback(self.guard)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's packs. The sampler knows rank and world size, so the loader is not sharded again."""
        if self.packs is None:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.packs,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _save(self, output_dir=None, state_dict=None) -> None:
        if not self.save_trained_only:
            super()._save(output_dir, state_dict)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, Path(output_dir) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result) -> None:
        if not self.save_trained_only:
            super()._issue_warnings_after_load(load_result)
        elif load_result.unexpected_keys:
            raise UserError(f"the checkpoint trained other parts: {load_result.unexpected_keys[0]}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs.pop("ids", [])
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self.guard.saw(ids, loss.detach())
        return result


class EngineCheck(TrainerCallback):
    """FSDP was asked for: then FSDP must have wrapped the model, and not something that merely runs."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        wrapped = self.trainer.model_wrapped
        if args.fsdp and not isinstance(wrapped, (FSDPModule, FullyShardedDataParallel)):
            raise UserError(
                f"--fsdp was asked for, but {type(wrapped).__name__} wraps the model. Fix: see --fsdp_config"
            )


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch. The Trainer's own `set_epoch` does not reach it through a resumed, sharded loader."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.packs is not None:
            self.trainer.packs.set_epoch(int(round(state.epoch, 6)))


class Guard(TrainerCallback):
    """Stops before an update that would spoil the weights, and writes down which records were in the batch.

    DeepSpeed updates inside its backward pass and keeps gradients to itself: there the loss alone is seen, and the run
    stops right after that update, before anything is saved.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: list[tuple[list[str], torch.Tensor]] = []

    def saw(self, ids: list[str], loss: torch.Tensor) -> None:
        self.seen.append((ids, loss))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        seen, self.seen = self.seen, []
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.fp16:  # its loss scale is found by gradients that overflow, and those steps are left out
            gradients = []
        norms = torch.stack(torch._foreach_norm(gradients)).sum() if gradients else torch.zeros(())
        losses = torch.stack([loss for _, loss in seen])
        if bool(torch.isfinite(losses).all() & torch.isfinite(norms).to(losses.device)):
            return
        bad = [index for index, value in enumerate(losses.tolist()) if not math.isfinite(value)]
        what = "loss" if bad else "gradient"
        ids = [record for index in bad or range(len(seen)) for record in seen[index][0]]
        path = self.folder / f"broken_batch.rank{args.process_index}.json"
        write_json(
            path, {"step": state.global_step + 1, "what": what, "losses": list(map(str, losses.tolist())), "ids": ids}
        )
        raise UserError(
            f"the {what} of step {state.global_step + 1} is no finite number; the {len(ids)} records of that batch are in "
            f"{path}. Fix: look at them, lower the learning rate, or check the checkpoint"
        )


class Preemption(TrainerCallback):
    """On SIGTERM or SIGUSR1: finish the step, save a checkpoint, leave. `asked` tells the caller to exit with `runs.PREEMPTED`.

    Every rank gets the signal from its launcher; the step is the same for all because they agree on it each step. One
    flag a process: a signal that comes before training begins is not forgotten.
    """

    asked = False

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        Preemption.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            flag = torch.tensor([float(self.asked)], device=args.device)
            torch.distributed.all_reduce(flag)
            Preemption.asked = bool(flag.item())
        if self.asked:
            control.should_save = control.should_training_stop = True


class JsonlLog(TrainerCallback):
    """Appends every log line to `log.jsonl`."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget what a killed run logged after the checkpoint that this one continues from."""
        if state.is_world_process_zero and self.path.is_file():
            write_records(self.path, [row for row in read_jsonl(self.path) if row["step"] <= state.global_step])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with RecordAppender(self.path) as log:
            log.append({"step": state.global_step, **logs})


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of a line of numbers for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-*` that was saved to its end, or None.

    The Trainer writes `trainer_state.json` last, so a folder without it was cut off; it is passed over with a note.
    """
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            found.append((state["global_step"], str(checkpoint)))
        except (OSError, ValueError, KeyError):
            logger.warning("%s is incomplete and is passed over", checkpoint)
    return max(found)[1] if found else None


def plot_loss(folder: Path) -> None:
    """Draw `log.jsonl` as `loss.png`: loss and learning rate over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    if not rows:
        return
    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#2563eb", marker=".")
    axis.set(xlabel="step", ylabel="loss", title=folder.name)
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot([row["step"] for row in rows], [row["learning_rate"] for row in rows], color="#9ca3af", linewidth=1)
    rate.set_ylabel("learning rate", color="#6b7280")
    figure.savefig(folder / "loss.png", dpi=110)
    pyplot.close(figure)
