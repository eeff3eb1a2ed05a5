"""transformers' Trainer with what SICOG's stages need besides: length grouping, a log people can read, complete resume.

Distribution, precision, checkpoints and reporting are the Trainer's own.
"""

import json
import logging
import math
from pathlib import Path

from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from llava.data.sampler import LengthGroupedSampler
from llava.errors import UserError
from llava.records import RecordAppender, read_jsonl, write_records

logger = logging.getLogger(__name__)


class SupervisedTrainer(Trainer):
    """Trainer over a ConversationDataset.

    Args:
        group_by_length: draw batches of similar length, still in random order.
    """

    def __init__(self, *args, group_by_length: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.group_by_length = group_by_length
        self.grouped: LengthGroupedSampler | None = None
        self.add_callback(EpochOrder(self))

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(dataset)
        self.grouped = LengthGroupedSampler(
            lengths=[dataset.length(index) for index in range(len(dataset))],
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.seed,
        )
        return self.grouped


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch. The Trainer's own `set_epoch` does not reach it through a resumed, sharded loader."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.grouped is not None:
            self.trainer.grouped.set_epoch(int(round(state.epoch, 6)))


class JsonlLog(TrainerCallback):
    """Appends every log line to `log.jsonl`, and stops the run on a loss that is no number."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget what a killed run logged after the checkpoint that this one continues from."""
        if state.is_world_process_zero and self.path.is_file():
            write_records(self.path, [row for row in read_jsonl(self.path) if row["step"] <= state.global_step])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"{key} is {value} at step {state.global_step}. Fix: lower the learning rate, or look for broken records"
                )
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
