"""From marks to a benchmark's number: totals, 95% intervals, and tests between two models on the same questions.

A benchmark is a set of units that are drawn independently: a question, a group of rotated questions (MMBench), an image
with its two questions (MME). Every unit carries counts that add up, and the number is a function of their sums, so that
one bootstrap and one permutation test serve all of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.eval.cider import cider
from llava.eval.scoring import answers_of

SAMPLES = 2000  # of the bootstrap
SWAPS = 9999  # of the permutation test
PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
Scored = dict[
    str, Any
]  # a prediction with `index`, `extracted`, `score` and the row's `category`, `image_path`, `answer`


@dataclass(frozen=True)
class Units:
    """The units of one benchmark and model.

    Attributes:
        names: (n,) what each unit is called; the same questions give the same names.
        counts: (n, k) float64 counts that add up.
        value: (..., k) sums -> (...) the benchmark's number, in its own points (most: per cent).
        details: further numbers of the benchmark, by name.
    """

    names: list[str]
    counts: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    details: dict[str, float]

    def in_order(self, names: list[str]) -> "Units":
        """The same units in another order. Raises KeyError for a unit that is not there."""
        places = {name: place for place, name in enumerate(self.names)}
        return Units(names, self.counts[[places[name] for name in names]], self.value, self.details)

    def number(self) -> float:
        return float(self.value(self.counts.sum(0)))


def share(sums: np.ndarray) -> np.ndarray:
    """First count per second, in per cent."""
    return 100 * ratio(sums[..., 0], sums[..., 1])


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


def mean(rows: list[Scored]) -> Units:
    """Mean mark in per cent; also by category."""
    return Units([row["index"] for row in rows], pairs([row["score"] for row in rows]), share, by_category(rows))


def circular(rows: list[Scored]) -> Units:
    """MMBench: a question counts when it is answered rightly in every rotation (index modulo a million) of its options."""
    groups: dict[int, list[Scored]] = defaultdict(list)
    for row in rows:
        groups[int(row.get("g_index") or int(row["index"]) % 1_000_000)].append(row)
    asked = [
        {**next(row for row in group if int(row["index"]) == number), "score": min(row["score"] for row in group)}
        for number, group in groups.items()
        if any(int(row["index"]) == number for row in group)
    ]
    alone = 100 * sum(row["score"] for row in rows) / len(rows)
    return Units(
        [row["index"] for row in asked], pairs([row["score"] for row in asked]), share,
        {"every rotation by itself": alone, **by_category(asked)},
    )  # fmt: skip


def f1(rows: list[Scored]) -> Units:
    """POPE: F1 of `Yes`; an answer that says neither counts as `No` there, and as wrong in accuracy.

    A question in several categories (separated by commas) counts in each.
    """
    counts = []
    for row in rows:
        right, said = row["answer"].strip().lower() == "yes", row["extracted"] == "Yes"
        weight = len(row["category"].split(",")) if row.get("category") else 1
        counts.append([weight * number for number in (right and said, said and not right, right and not said, row["score"], 1)])  # fmt: skip
    table = np.array(counts, dtype=np.float64)
    hits, false, missed, correct, total = table.sum(0)
    details = {
        "accuracy": 100 * float(ratio(correct, total)), "precision": 100 * float(ratio(hits, hits + false)),
        "recall": 100 * float(ratio(hits, hits + missed)),
    }  # fmt: skip
    return Units([row["index"] for row in rows], table, f1_of, details)


def f1_of(sums: np.ndarray) -> np.ndarray:
    return 100 * ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def mme(rows: list[Scored]) -> Units:
    """MME: per category, accuracy of questions plus share of images with both right; perception adds ten of them."""
    images: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        images[row["category"], row.get("image_path") or row["index"]].append(row["score"])
    categories = sorted({category for category, _ in images})
    table = np.zeros((len(images), len(categories), 4))
    for place, ((category, _), scores) in enumerate(images.items()):
        both = math.prod(scores[:2]) if len(scores) > 1 else 0.0
        table[place, categories.index(category)] = sum(scores), len(scores), both, 1
    counts = table.reshape(len(images), -1)

    def points(sums: np.ndarray, chosen: tuple[str, ...]) -> np.ndarray:
        grid = sums.reshape(*sums.shape[:-1], len(categories), 4)
        each = 100 * (ratio(grid[..., 0], grid[..., 1]) + ratio(grid[..., 2], grid[..., 3]))
        return each[..., [category in chosen for category in categories]].sum(-1)

    sums = counts.sum(0)
    details = {category: float(points(sums, (category,))) for category in categories}
    details = {"reasoning": float(points(sums, REASONING)), **details}
    names = [f"{category}/{image}" for category, image in images]
    return Units(names, counts, lambda sums: points(sums, PERCEPTION), details)


def ocrbench(rows: list[Scored]) -> Units:
    """OCRBench: right answers of 1,000, divided by ten."""
    counts = np.array([[row["score"]] for row in rows])
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        category = row.get("category") or ""
        found["Text Recognition" if category.endswith(" Recognition") and "Expression" not in category else category] += row["score"]  # fmt: skip
    return Units([row["index"] for row in rows], counts, lambda sums: sums[..., 0] / 10, dict(found))


def captions(rows: list[Scored]) -> Units:
    """COCO: mean CIDEr-D of the captions, times 100."""
    scores = cider([row["extracted"] for row in rows], [answers_of(row) for row in rows])
    return Units([row["index"] for row in rows], pairs(scores), share, {})


TOTALS: dict[str, Callable[[list[Scored]], Units]] = {
    "mean": mean, "circular": circular, "f1": f1, "mme": mme, "ocrbench": ocrbench, "cider": captions,
}  # fmt: skip


def pairs(scores: list[float]) -> np.ndarray:
    return np.array([[score, 1] for score in scores], dtype=np.float64)


def by_category(rows: list[Scored]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("category"):
            groups[row["category"]].append(row["score"])
    return {name: 100 * sum(scores) / len(scores) for name, scores in sorted(groups.items())}


def interval(units: Units, seed: int = 0) -> tuple[float, float]:
    """95% interval of the number: Wilson's where every unit is right or wrong, else a percentile bootstrap over units."""
    scores, weights = units.counts[:, 0], units.counts[:, -1]
    if units.value is share and np.isin(scores, (0, 1)).all() and (weights == 1).all():
        low, high = wilson(int(scores.sum()), len(scores))
        return 100 * low, 100 * high
    low, high = np.percentile(resampled(units.value, [units.counts], seed)[0], [2.5, 97.5])
    return float(low), float(high)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval).

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.49, 0.943]
    """
    z = 1.959964
    proportion, spread = correct / total, z * z / total
    middle = proportion + spread / 2
    half = z * math.sqrt(proportion * (1 - proportion) / total + spread / (4 * total))
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def resampled(value: Callable, tables: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """(SAMPLES,) numbers of each (n, k) table over the same resampled units."""
    rng = np.random.default_rng(seed)
    count = len(tables[0])
    parts = []
    for _ in range(0, SAMPLES, 100):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=100).astype(np.float64)
        parts.append([value(weights @ table) for table in tables])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def compare(first: Units, second: Units, seed: int = 0) -> tuple[float, tuple[float, float], float]:
    """Number of `second` minus `first`, its 95% interval, and the probability of such a difference by chance.

    The interval is a paired bootstrap over units; the probability (two-sided) a permutation test that exchanges the two
    models' units at random. Both have the same units in the same order.
    """
    observed = second.number() - first.number()
    one, other = resampled(first.value, [first.counts, second.counts], seed)
    low, high = np.percentile(other - one, [2.5, 97.5])
    change = second.counts - first.counts
    differing = change[(change != 0).any(1)]
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, SWAPS, 1000):
        swapped = rng.integers(0, 2, (min(1000, SWAPS - start), len(differing))) @ differing
        difference = first.value(second.counts.sum(0) - swapped) - first.value(first.counts.sum(0) + swapped)
        extreme += int((np.abs(difference) >= abs(observed) - 1e-9).sum())
    return observed, (float(low), float(high)), (1 + extreme) / (1 + SWAPS)
