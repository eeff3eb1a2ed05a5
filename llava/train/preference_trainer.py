"""The trainer of preferences: `SupervisedTrainer` over pairs, with the loss of `preference.py`."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from llava.records import read_jsonl
from llava.train.preference import PreferenceSettings, Sides, metrics, objective
from llava.train.trainer import SupervisedTrainer


def answer_log_probs(model, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every answer of a batch, summed over its tokens, and their number: (sequences,) float32 each.

    Args:
        batch: of `PairCollator`, or `Collator`: packed or padded.
    """
    labelled = batch["labels"][:, 1:] != -100
    if "cu_seq_lens" in batch:
        places = labelled[0].nonzero()[:, 0] + 1  # of the predicted tokens in the row
        sequence = torch.searchsorted(batch["cu_seq_lens"].long(), places, right=True) - 1
        count = len(batch["cu_seq_lens"]) - 1
    else:
        sequence, count = labelled.nonzero()[:, 0], len(labelled)
    losses = model(**batch, token_losses=True).token_losses.float()
    sums = torch.zeros(count, device=losses.device).index_add(0, sequence, -losses)
    return sums, learned_tokens(batch).to(sums)


def learned_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """(sequences,) number of labels of every sequence."""
    learned = (batch["labels"] != -100).long()  # the first token of a sequence has none
    if "cu_seq_lens" not in batch:
        return learned[:, 1:].sum(1)
    before = torch.cat([learned.new_zeros(1), learned[0].cumsum(0)])
    return before[batch["cu_seq_lens"].long()].diff()


class PreferenceTrainer(SupervisedTrainer):
    """Trainer over a PairDataset.

    A step's loss is that of one large batch, whatever the number of ranks and micro-batches: `num_items_in_batch` holds
    its pairs and its chosen tokens.
    """

    def __init__(self, *args, settings: PreferenceSettings, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.sums: dict[str, float | torch.Tensor] = defaultdict(float)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        counts = torch.zeros(2, device=device)
        for batch in batch_samples:
            chosen = learned_tokens(batch)[0::2]
            counts += torch.stack([(chosen > 0).sum(), chosen.sum()]).to(counts)
        return self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, reference = inputs.pop("ids"), inputs.pop("reference")
        answers, tokens = answer_log_probs(model, inputs)
        kept = (tokens[0::2] > 0).nonzero()[:, 0]  # not what only keeps a rank busy
        policy = Sides(answers[0::2][kept], answers[1::2][kept])
        reference = torch.tensor(reference, dtype=torch.float32, device=answers.device)[kept]
        frozen = Sides(reference[:, 0], reference[:, 1])
        counts = Sides(tokens[0::2][kept], tokens[1::2][kept])
        pairs, learned = num_items_in_batch
        loss = objective(policy, frozen, counts, self.settings, pairs, learned)
        loss = loss + 0.0 * answers.sum()  # in the graph even where nothing is learned
        self.guard.saw(ids, loss.detach())
        if len(kept):
            self.note(len(kept), metrics(policy, frozen, self.settings.beta))
        return loss * self.accelerator.num_processes  # DDP takes the mean over ranks

    def note(self, pairs: int, found: dict[str, torch.Tensor]) -> None:
        self.sums["pairs"] += pairs
        for name, value in found.items():
            self.sums[name] += pairs * value.detach()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log over all ranks; every rank is here, also one that had no pair."""
        if "loss" in logs:
            names = ("pairs", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                     "logps/chosen", "logps/rejected")  # fmt: skip
            sums = torch.tensor([float(self.sums[name]) for name in names], device=self.args.device)
            pairs, *values = self.accelerator.reduce(sums, "sum").tolist()
            if pairs:
                logs.update({name: value / pairs for name, value in zip(names[1:], values, strict=True)})
            self.sums.clear()
        super().log(logs, *args, **kwargs)


def plot_preference(folder: Path) -> None:
    """Draw `log.jsonl` as `preference.png`: margin and accuracy of the implicit rewards over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_jsonl(folder / "log.jsonl") if "rewards/margins" in row]
    if not rows:
        return
    steps = [row["step"] for row in rows]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(6, 4.6), sharex=True, layout="constrained")
    for side, style in (("chosen", "-"), ("rejected", "--"), ("margins", ":")):
        above.plot(steps, [row[f"rewards/{side}"] for row in rows], style, marker=".", label=side.removesuffix("s"))
    above.set(ylabel="reward", title=folder.name)
    above.legend()
    below.plot(steps, [row["rewards/accuracies"] for row in rows], color="#2563eb", marker=".")
    below.set(xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02))
    below.axhline(0.5, color="#9ca3af", linewidth=1)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(folder / "preference.png", dpi=110)
    pyplot.close(figure)
