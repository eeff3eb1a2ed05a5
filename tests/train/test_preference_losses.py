"""Preference losses against arithmetic by hand, their limits, their gradients, and TRL's values."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from llava.errors import UserError
from llava.train.preference import LOSSES, PreferenceSettings, Sides, metrics, objective, preference_losses


def sides(chosen, rejected, dtype=torch.float64) -> Sides:
    return Sides(torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype))


# log-ratios: chosen 2 and -3, rejected -4 and -1, so d = 6 and -2; per token 0.2, -0.6 less -0.2, -0.2: 0.4 and -0.4
POLICY = sides([-10.0, -8.0], [-24.0, -6.0])
REFERENCE = sides([-12.0, -5.0], [-20.0, -5.0])
TOKENS = sides([10, 5], [20, 5], torch.int64)


def losses(policy=POLICY, reference=REFERENCE, tokens=TOKENS, **settings) -> torch.Tensor:
    return preference_losses(policy, reference, tokens, PreferenceSettings(**settings))


def close(actual, expected) -> bool:
    return torch.allclose(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0)


def test_dpo_by_hand():
    # 0.1 d = 0.6 and -0.2: log(1 + exp(-0.6)) = log 1.548812 = 0.437488, log(1 + exp(0.2)) = log 2.221403 = 0.798139
    assert close(losses(), [0.437488, 0.798139])


def test_label_smoothing_by_hand():
    # the swapped side: log(1 + exp(0.6)) = 0.437488 + 0.6 = 1.037488, log(1 + exp(-0.2)) = 0.798139 - 0.2 = 0.598139
    # 0.9 * 0.437488 + 0.1 * 1.037488 = 0.497488, 0.9 * 0.798139 + 0.1 * 0.598139 = 0.778139
    assert close(losses(label_smoothing=0.1), [0.497488, 0.778139])


def test_length_normalised_dpo_by_hand():
    # beta 5: 5 * 0.4 = 2 and -2: log(1 + exp(-2)) = 0.126928, and 2 more
    assert close(losses(loss="sigmoid_norm", beta=5.0), [0.126928, 2.126928])


def test_ipo_by_hand():
    # 1 / (2 * 0.5) = 1: (0.4 - 1)^2 = 0.36, (-0.4 - 1)^2 = 1.96
    assert close(losses(loss="ipo", beta=0.5), [0.36, 1.96])


def test_objective_by_hand():
    # mean of 0.437488 and 0.798139 is 0.6178135; the chosen sides' 15 tokens have -18: 1.2 a token
    total = objective(POLICY, REFERENCE, TOKENS, PreferenceSettings())
    assert close(total, 0.6178135 + 1.2)
    assert close(objective(POLICY, REFERENCE, TOKENS, PreferenceSettings(alpha=0.0)), 1.2)
    assert close(objective(POLICY, REFERENCE, TOKENS, PreferenceSettings(gamma=0.0)), 0.6178135)
    assert close(
        objective(POLICY, REFERENCE, TOKENS, PreferenceSettings(alpha=2.0, gamma=0.5)), 2 * 0.6178135 + 0.5 * 1.2
    )


def test_metrics_by_hand():
    # rewards 0.1 * (2, -3) and 0.1 * (-4, -1); the first pair is right, the second wrong
    found = metrics(POLICY, REFERENCE, beta=0.1)
    expected = {
        "rewards/chosen": -0.05, "rewards/rejected": -0.25, "rewards/margins": 0.2, "rewards/accuracies": 0.5,
        "logps/chosen": -9.0, "logps/rejected": -15.0,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-9), name


def test_a_tie_is_half_right():
    assert metrics(POLICY, POLICY, 0.1)["rewards/accuracies"] == 0.5
    tied = sides([-1.0, -1.0], [-2.0, -2.0])
    assert metrics(Sides(tied.chosen + torch.tensor([0.0, 1.0]), tied.rejected), tied, 0.1)[
        "rewards/accuracies"
    ] == pytest.approx(0.75)


def test_metrics_carry_no_gradient():
    policy = Sides(*(values.clone().requires_grad_() for values in POLICY))
    assert not any(value.requires_grad for value in metrics(policy, REFERENCE, 0.1).values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_an_untrained_policy_loses_log_2(loss, smoothing):
    assert close(losses(POLICY, POLICY, loss=loss, label_smoothing=smoothing), [math.log(2)] * 2)


def test_an_untrained_policy_misses_the_whole_ipo_target():
    assert close(losses(POLICY, POLICY, loss="ipo", beta=0.1), [25.0, 25.0])  # (0 - 1 / 0.2)^2


def test_beta_scales_the_log_ratios():
    twice = Sides(*(r + 2 * (p - r) for p, r in zip(POLICY, REFERENCE, strict=True)))
    for loss in ("sigmoid", "sigmoid_norm"):
        assert torch.allclose(losses(beta=0.6, loss=loss), losses(twice, beta=0.3, loss=loss))
    assert close(losses(beta=1e-9), [math.log(2)] * 2)
    assert close(losses(beta=50.0), [0.0, 100.0])  # the hinge: 0 where right, -beta d where wrong


def test_one_token_an_answer_is_plain_dpo():
    ones = sides([1, 1], [1, 1], torch.int64)
    assert torch.equal(losses(tokens=ones, loss="sigmoid_norm"), losses())


def test_smoothing_half_way_would_treat_both_sides_alike():
    swapped = [Sides(values.rejected, values.chosen) for values in (POLICY, REFERENCE, TOKENS)]
    # l_e(d) = (1 - e) l(d) + e l(-d), so swapping the sides is the same as e -> 1 - e: their sum does not depend on e
    for smoothing in (0.0, 0.1, 0.3):
        both = losses(label_smoothing=smoothing) + losses(*swapped, label_smoothing=smoothing)
        assert torch.allclose(both, losses() + losses(*swapped))


def test_smoothing_has_its_minimum_where_the_labels_are_that_sure():
    # the derivative vanishes at sigmoid(beta d) = 1 - e: beta d = log(0.9 / 0.1)
    d = (math.log(9) / 0.1) * torch.ones(2, dtype=torch.float64)
    chosen = (REFERENCE.chosen + d).requires_grad_()
    losses(Sides(chosen, REFERENCE.rejected), label_smoothing=0.1).sum().backward()
    assert close(chosen.grad, [0.0, 0.0])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_chosen_side_is_pushed_up_and_the_rejected_down(loss):
    policy = Sides(*(values.clone().requires_grad_() for values in POLICY))
    losses(policy, loss=loss).sum().backward()
    assert (policy.chosen.grad < 0).all()
    assert (policy.rejected.grad > 0).all()


def test_ipo_pulls_back_beyond_its_target():
    chosen = (REFERENCE.chosen + 100 * TOKENS.chosen).requires_grad_()
    losses(Sides(chosen, REFERENCE.rejected), loss="ipo").sum().backward()
    assert (chosen.grad > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "sigmoid_norm", "beta": 5.0},
        {"alpha": 0.3, "gamma": 2.0},
    ],
)
def test_gradients_numerically(settings):
    def total(chosen, rejected):
        return objective(Sides(chosen, rejected), REFERENCE, TOKENS, PreferenceSettings(**settings))

    assert torch.autograd.gradcheck(total, [values.clone().requires_grad_() for values in POLICY])


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_step_add_up_to_the_whole(loss):
    settings = PreferenceSettings(loss=loss)
    parts = [
        objective(
            *(Sides(values.chosen[row], values.rejected[row]) for values in (POLICY, REFERENCE, TOKENS)),
            settings, pairs_of_step=2, tokens_of_step=15,
        )
        for row in (slice(0, 1), slice(1, 2))
    ]  # fmt: skip
    assert torch.allclose(sum(parts), objective(POLICY, REFERENCE, TOKENS, settings))


def test_far_apart_answers_stay_finite():
    far = sides([-4000.0], [-1.0], torch.float32)
    near = sides([-1.0], [-4000.0], torch.float32)
    count = sides([900], [1], torch.int64)
    assert close(losses(far, near, count, beta=1.0), [7998.0])
    assert close(losses(near, far, count, beta=1.0), [0.0])


def test_wrong_shapes_and_too_few_bits_are_refused():
    with pytest.raises(ValueError, match=r"must all be \(b,\)"):
        losses(tokens=sides([1], [1], torch.int64))
    with pytest.raises(ValueError, match=r"must all be \(b,\)"):
        losses(*(Sides(values.chosen[None], values.rejected[None]) for values in (POLICY, REFERENCE, TOKENS)))
    with pytest.raises(ValueError, match="bfloat16"):
        losses(Sides(POLICY.chosen.bfloat16(), POLICY.rejected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "'hinge' is unknown. Fix: choose one of sigmoid, ipo, sigmoid_norm"),
        ({"beta": 0.0}, "beta 0.0 makes no sense"),
        ({"beta": float("nan")}, "beta nan"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
        ({"alpha": -1.0}, "alpha -1.0"),
        ({"gamma": float("inf")}, "gamma inf"),
        ({"alpha": 0.0, "gamma": 0.0}, "nothing would train"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "no meaning with ipo"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        PreferenceSettings(**settings)


def trl_loss(policy: Sides, reference: Sides, tokens: Sides, loss: str, **settings) -> tuple[float, dict[str, float]]:
    """What TRL's trainer makes of these log-probabilities, each spread evenly over its answer's tokens, and its metrics."""
    trainer = pytest.importorskip("trl").DPOTrainer
    if not hasattr(trainer, "_compute_loss"):
        pytest.skip("this TRL computes its loss elsewhere")
    counts = torch.cat(list(tokens))
    width = int(counts.max()) + 1  # an answer's first token is predicted from the prompt's last
    mask = (torch.arange(width) > 0) & (torch.arange(width) <= counts[:, None])  # (2b, width)
    per_token = torch.cat(list(policy))[:, None] / counts[:, None] * mask[:, 1:]
    nothing = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    def model(**_):
        return outputs

    model.training = True
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    log = defaultdict(lambda: defaultdict(list))
    fields = {
        "model": model, "accelerator": accelerator, "aux_loss_enabled": False, "ld_alpha": None,
        "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_types": [loss], "loss_weights": [1.0],
        "use_weighting": False, "_metrics": log, "_total_train_tokens": 0, "_tp_size": 1, "beta": 0.1,
        "label_smoothing": 0.0, **settings,
    }  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.int64), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(), "ref_chosen_logps": reference.chosen, "ref_rejected_logps": reference.rejected,
    }  # fmt: skip
    value = trainer._compute_loss(SimpleNamespace(**fields), model, inputs, False)
    return float(value), {name: values[-1] for name, values in log["train"].items()}


def random_pairs() -> tuple[Sides, Sides, Sides]:
    rng = torch.Generator().manual_seed(0)
    tokens = Sides(*torch.randint(1, 60, (2, 16), generator=rng))
    reference = Sides(*(-torch.rand(16, generator=rng, dtype=torch.float64) * 2 * count for count in tokens))
    policy = Sides(*(r + torch.randn(16, generator=rng, dtype=torch.float64) * 4 for r in reference))
    return policy, reference, tokens


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_trl(loss, beta):
    pairs = random_pairs()
    expected, logged = trl_loss(*pairs, loss, beta=beta)
    assert losses(*pairs, loss=loss, beta=beta).mean().item() == pytest.approx(expected, rel=1e-9)
    for name, value in metrics(*pairs[:2], beta).items():
        assert value.item() == pytest.approx(logged[name], rel=1e-9), name


def test_label_smoothing_equals_trl():
    """Of TRL 1.16's losses `aot` alone smooths as conservative DPO does; on one pair its sorting does nothing."""
    for row in range(16):
        pair = [Sides(values.chosen[row : row + 1], values.rejected[row : row + 1]) for values in random_pairs()]
        expected, _ = trl_loss(*pair, "aot", label_smoothing=0.2)
        assert losses(*pair, label_smoothing=0.2).item() == pytest.approx(expected, rel=1e-9)


def test_the_objective_equals_trl():
    pairs = random_pairs()
    expected, _ = trl_loss(*pairs, "", loss_types=["sigmoid", "sft"], loss_weights=[0.5, 2.0])
    ours = objective(*pairs, PreferenceSettings(alpha=0.5, gamma=2.0))
    assert ours.item() == pytest.approx(expected, rel=1e-9)
