"""What the report says about one scored.jsonl, gathered in one pass and constant memory: sums and seeded samples.

Sits between curate.py, which wrote the file, and report.py, which shows it; knows nothing of HTML and judges nothing
again. A record is counted and forgotten; only a `Reservoir` keeps some.
"""

import math
import random
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.records import Record, read_jsonl

SWEEP = [number / 100 for number in range(50, 100, 5)]
BINS = 40  # of the histogram, in an interval of length 1
SHOWN = 6  # kept and dropped records in each gallery
SAMPLE = 1000  # texts of a round on which distinct-2 is measured
PAIRS = 100_000  # and word pairs of these at most
STYLES = 20  # prompt styles counted by name; what else occurs is "other"


class Reservoir:
    """A uniform sample of a stream of unknown length; the same stream gives the same sample."""

    def __init__(self, size: int):
        self.size, self.seen, self.items = size, 0, []
        self.rng = random.Random(0)

    def add(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.items[place] = item


@dataclass
class Style:
    """One prompt style: how well its candidates agree with the others, and how often one of them is chosen."""

    candidates: int = 0
    score: float = 0.0
    wins: int = 0


@dataclass
class Round:
    """Sums over the candidates of one round of the cycle; a model that collapses shows in them."""

    candidates: int = 0
    score: float = 0.0
    words: int = 0
    repeated: float = 0.0
    long_enough: int = 0  # texts of four words or more
    cut_off: int = 0
    finished: int = 0  # candidates that say how they ended
    texts: Reservoir = field(default_factory=lambda: Reservoir(SAMPLE))

    def add(self, candidate: dict[str, Any]) -> None:
        words = words_of(candidate["text"])
        self.candidates += 1
        self.score += candidate["score"]
        self.words += len(words)
        if len(words) >= 4:
            self.long_enough += 1
            self.repeated += 1 - distinct(ngrams(words, 4))
        if candidate.get("finish_reason") is not None:
            self.finished += 1
            self.cut_off += candidate["finish_reason"] == "length"
        self.texts.add(candidate["text"])

    def bigrams(self) -> list[tuple[str, ...]]:
        """The first word pairs of the sampled texts."""
        return list(islice((pair for text in self.texts.items for pair in ngrams(words_of(text), 2)), PAIRS))


def words_of(text: str) -> list[str]:
    return text.lower().split()


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def distinct(items: list) -> float:
    """Share of different items among all.

    >>> distinct(ngrams("a b a b a".split(), 2))
    0.5
    """
    return len(set(items)) / len(items)


@dataclass
class Tally:
    """Sums over the records of one scored.jsonl."""

    threshold: float
    records: int = 0
    kept: int = 0
    histogram: dict[int, list[int]] = field(default_factory=dict)  # bin -> [kept, dropped]
    styles: dict[str, Style] = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    kept_sample: Reservoir = field(default_factory=lambda: Reservoir(SHOWN))
    dropped_sample: Reservoir = field(default_factory=lambda: Reservoir(SHOWN))

    def __post_init__(self) -> None:
        self.thresholds = sorted({*SWEEP, self.threshold})
        self.buckets = [[0, 0.0, 0] for _ in range(len(self.thresholds) + 1)]  # records, scores, words of the chosen

    def add(self, record: Record) -> None:
        decision, candidates = record["decision"], record["candidates"]
        score, kept = decision["score"], decision["kept"]
        self.records += 1
        self.kept += kept
        (self.kept_sample if kept else self.dropped_sample).add(record)
        self.histogram.setdefault(bin_of(score), [0, 0])[not kept] += 1
        bucket = self.buckets[bisect_right(self.thresholds, score)]
        bucket[0] += 1
        bucket[1] += score
        bucket[2] += len(words_of(candidates[decision["chosen"]]["text"]))
        for index, candidate in enumerate(candidates):
            self.rounds.setdefault(candidate.get("round", 1), Round()).add(candidate)
            style = self.style(candidate.get("style") or "not named")
            style.candidates += 1
            style.score += candidate["score"]
            style.wins += index == decision["chosen"]

    def style(self, name: str) -> Style:
        known = name in self.styles or len(self.styles) < STYLES
        return self.styles.setdefault(name if known else "other", Style())

    def sweep(self) -> list[tuple[float, int, float, float]]:
        """(threshold, records whose best score reaches it, their mean score, mean words of their chosen texts)."""
        rows = []
        for place, threshold in enumerate(self.thresholds):
            records, scores, words = (sum(column) for column in zip(*self.buckets[place + 1 :], strict=True))
            rows.append((threshold, records, scores / records, words / records) if records else (threshold, 0, 0, 0))
        return rows

    def distinct_2(self) -> tuple[dict[int, float | None], int]:
        """Share of different word pairs for every round, and the number of pairs it was measured on.

        More text repeats more, so every round is measured on as many pairs as the shortest sample has.
        """
        pairs = {number: each.bigrams() for number, each in self.rounds.items()}
        size = min((len(found) for found in pairs.values() if found), default=0)
        return {number: distinct(found[:size]) if found else None for number, found in pairs.items()}, size


def bin_of(score: float) -> int:
    """Number of the histogram's bin, 0 at score 0; a score of 1 belongs to the last one below 1."""
    return max(-BINS, min(math.floor(score * BINS + 1e-6), BINS - 1))


def tally(path: Path) -> Tally | None:
    """Read a scored.jsonl once; None when it holds no record.

    Raises UserError when there is no such file, or at a row without candidates or decision.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Fix: give a folder written by quality_evaluation.curate")
    result = None
    for record in read_jsonl(path):
        if not isinstance(record, dict) or not {"decision", "candidates"} <= record.keys():
            raise UserError(
                f"{path} holds a row without a decision. Fix: give a folder written by quality_evaluation.curate"
            )
        result = result or Tally(record["decision"]["threshold"])
        result.add(record)
    return result
