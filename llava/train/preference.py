"""Preference losses as functions of log-probabilities: DPO and what trains beside it. No model, no trainer.

The objective is the published code's, over b pairs of a batch (paper, DPO variants):

    alpha * mean(preference loss of each pair) + gamma * mean negative log-likelihood of the chosen answers' tokens

Everything comes as two sides, each (b,): `policy` and `reference` hold the natural logarithm of an answer's probability,
summed over its learned tokens, in float32 (float64 for tests); `tokens` the numbers of these tokens, at least 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llava.errors import UserError

LOSSES = ("sigmoid", "ipo", "sigmoid_norm")


class Sides(NamedTuple):
    """One number for each side of each pair."""

    chosen: torch.Tensor  # (b,)
    rejected: torch.Tensor  # (b,)


@dataclass(frozen=True)
class PreferenceSettings:
    """What is minimised.

    Args:
        loss: `sigmoid` (DPO), `ipo`, or `sigmoid_norm` (DPO on log-probabilities per token).
        beta: how strongly the policy is held to the reference; IPO's tau. Per-token losses see ratios that are smaller
            by the length of an answer, so `sigmoid_norm` wants a beta larger by about that factor.
        label_smoothing: the share of pairs whose sides are taken to be swapped (conservative DPO); none with `ipo`.
        alpha: weight of the preference loss.
        gamma: weight of the chosen answers' negative log-likelihood; 0 is DPO alone.

    Raises:
        UserError: a value that makes no sense.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    alpha: float = 1.0
    gamma: float = 1.0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} is unknown. Fix: choose one of {', '.join(LOSSES)}")
        checks = {
            "beta": (0 < self.beta < float("inf"), "a number above 0, such as 0.1"),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "a number from 0 to below 0.5"),
            "alpha": (0 <= self.alpha < float("inf"), "a number from 0, such as 1"),
            "gamma": (0 <= self.gamma < float("inf"), "a number from 0, such as 1"),
        }
        for name, (valid, fix) in checks.items():
            if not valid:
                raise UserError(f"{name} {getattr(self, name)} makes no sense. Fix: {fix}")
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(f"label_smoothing {self.label_smoothing} has no meaning with ipo. Fix: 0, or another loss")
        if not self.alpha and not self.gamma:
            raise UserError("alpha and gamma are both 0, so nothing would train. Fix: raise one of them")


def log_ratios(policy: Sides, reference: Sides) -> Sides:
    """How much more likely the policy finds each answer than the reference does, in nats."""
    return Sides(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def preference_losses(policy: Sides, reference: Sides, tokens: Sides, settings: PreferenceSettings) -> torch.Tensor:
    """(b,) loss of each pair; d is the chosen answer's log-ratio less the rejected one's.

    sigmoid       -log sigmoid(beta d), DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with label smoothing e
                  -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), conservative DPO (Mitchell 2023)
    sigmoid_norm  the same with each log-ratio divided by its answer's tokens (Lambert et al. 2024, arXiv 2411.15124)
    ipo           (d - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17), d per token as in TRL: sums would
                  make the target depend on the answers' lengths

    Raises:
        ValueError: shapes differ, or a log-probability has fewer than 32 bits.
    """
    check_sides(policy, reference, tokens)
    chosen, rejected = log_ratios(policy, reference)
    if settings.loss != "sigmoid":
        chosen, rejected = chosen / tokens.chosen, rejected / tokens.rejected
    difference = chosen - rejected
    if settings.loss == "ipo":
        return (difference - 1 / (2 * settings.beta)) ** 2
    scaled, swapped = settings.beta * difference, settings.label_smoothing
    return -(1 - swapped) * F.logsigmoid(scaled) - swapped * F.logsigmoid(-scaled)


def objective(
    policy: Sides,
    reference: Sides,
    tokens: Sides,
    settings: PreferenceSettings,
    pairs_of_step: int | torch.Tensor | None = None,
    tokens_of_step: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The scalar to minimise: alpha * mean(preference) + gamma * negative log-likelihood a chosen token.

    Where one optimizer step adds up several batches, give the pairs and the chosen sides' tokens of the whole step: the
    parts then add up to what one large batch would give, which means over parts of unlike lengths do not.

    Raises:
        ValueError: as `preference_losses`.
    """
    losses = preference_losses(policy, reference, tokens, settings)
    pairs = len(losses) if pairs_of_step is None else pairs_of_step
    learned = tokens.chosen.sum() if tokens_of_step is None else tokens_of_step
    return settings.alpha * losses.sum() / pairs - settings.gamma * policy.chosen.sum() / learned


@torch.no_grad()
def metrics(policy: Sides, reference: Sides, beta: float) -> dict[str, torch.Tensor]:
    """Scalars to log, means over the batch, under TRL's names.

    An answer's reward is beta * log-ratio (DPO's implicit reward), summed over its tokens whatever the loss, so that runs with
    different losses compare. `accuracies` is the share of pairs whose chosen side has the higher reward; a tie counts as
    half, so that an untrained policy shows 0.5 (TRL counts ties as wrong and shows 0).
    """
    ratios = log_ratios(policy, reference)
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (torch.sign(chosen - rejected) + 1).mean() / 2,
        "logps/chosen": policy.chosen.mean(),
        "logps/rejected": policy.rejected.mean(),
    }


def check_sides(policy: Sides, reference: Sides, tokens: Sides) -> None:
    shapes = [tuple(values.shape) for sides in (policy, reference, tokens) for values in sides]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"policy, reference and tokens must all be (b,), chosen and rejected; they are {shapes}")
    for values in (*policy, *reference):
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"log-probabilities are {values.dtype}; sums over an answer need float32")
