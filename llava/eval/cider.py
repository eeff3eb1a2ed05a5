"""CIDEr-D (Vedantam et al. 2015), by which caption benchmarks such as COCO are scored, as pycocoevalcap computes it."""

import math
from collections import Counter

LONGEST, SIGMA = 4, 6.0  # words of an n-gram; of the penalty for another length
Grams = Counter[tuple[str, ...]]


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """The score of each caption against its image's references, 0 to 10; a benchmark's number is 100 times their mean.

    Rare n-grams weigh more: how rare is counted over the references of all images, so that scores of two sets of images
    cannot be compared. Words are what blanks separate.
    """
    cooked = [[grams(text) for text in texts] for texts in references]
    seen: Counter[tuple[str, ...]] = Counter(gram for texts in cooked for gram in set().union(*texts))
    images = math.log(len(captions))

    def weights(counts: Grams) -> list[dict[tuple[str, ...], float]]:
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (images - math.log(max(1, seen[gram])))
        return found

    scores = []
    for text, texts in zip(captions, cooked, strict=True):
        said = grams(text)
        weighted = weights(said)
        total = 0.0
        for reference in texts:
            penalty = math.exp(-((pairs(said) - pairs(reference)) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(map(likeness, weighted, weights(reference))) / LONGEST
        scores.append(10 * total / len(texts))
    return scores


def grams(text: str) -> Grams:
    words = text.split()
    return Counter(
        tuple(words[start : start + size]) for size in range(1, LONGEST + 1) for start in range(len(words) - size + 1)
    )


def pairs(counts: Grams) -> int:
    """The length that the penalty compares: the number of word pairs."""
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def likeness(said: dict[tuple[str, ...], float], right: dict[tuple[str, ...], float]) -> float:
    """Cosine, each n-gram counted no more often than the reference has it."""
    norm = math.hypot(*said.values()) * math.hypot(*right.values())
    return (
        sum(min(weight, right.get(gram, 0.0)) * right.get(gram, 0.0) for gram, weight in said.items()) / norm
        if norm
        else 0.0
    )
