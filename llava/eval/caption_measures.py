"""What is counted in one caption: mentions of objects, words shared with a reference, repetition. Standard library only.

Pure functions; `llava.eval.captions` reads files, averages and says what each measure means.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from llava.errors import UserError

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the and or but nor so if then than as of in on at to from by with for into onto about it its this that these
        those there here he she his her him they their them we our us you your i my is are was were be been being am has
        have had do does did can could may might will would should not no which who whom whose what where when while also
        very some any each both other such s t""",
    )
)
IRREGULAR = {
    "person": "people", "man": "men", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese",
    "mouse": "mice", "knife": "knives", "leaf": "leaves", "shelf": "shelves", "loaf": "loaves", "wolf": "wolves",
    "scarf": "scarves",
}  # fmt: skip
Values = dict[str, float]  # what is counted in one caption, or its mean over an image's captions; absent is 0


class Measure(NamedTuple):
    """A row of the table: the sum of one value over images, divided by the sum of another."""

    label: str
    numerator: str
    denominator: str
    percent: bool


MEASURES = {
    "chair_i": Measure("CHAIR_i (lower is better)", "hallucinated", "named", True),
    "chair_s": Measure("CHAIR_s (lower is better)", "hallucinates", "with_objects", True),
    "coverage": Measure("objects covered", "covered", "objects", True),
    "named": Measure("mentions of objects a caption", "named", "with_objects", False),
    "present": Measure("- of those present", "present", "with_objects", False),
    "hallucinated": Measure("- of those hallucinated", "hallucinated", "with_objects", False),
    "precision": Measure("content words, precision", "precision", "with_references", True),
    "recall": Measure("content words, recall", "recall", "with_references", True),
    "f1": Measure("content words, F1", "f1", "with_references", True),
    "rouge_l": Measure("ROUGE-L F1", "rouge_l", "with_references", True),
    "words": Measure("words a caption", "words", "images", False),
    "distinct": Measure("different words a caption", "distinct", "images", False),
    "repetition": Measure("repeated 4-grams", "repetition", "images", True),
    "empty": Measure("empty captions", "empty", "images", True),
}
VALUES = list(
    dict.fromkeys(value for measure in MEASURES.values() for value in (measure.numerator, measure.denominator))
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def plurals(name: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Plural forms of a name's last word.

    >>> sorted(plurals(("snow", "man"))), plurals(("bus",))
    ([('snow', 'mans'), ('snow', 'men')], {('buses',)})
    """
    *first, last = name
    forms = {last[: -len(one)] + many for one, many in IRREGULAR.items() if last.endswith(one)}
    if re.search(r"(s|x|z|ch|sh|o)$", last):
        forms.add(f"{last}es")
    if re.search(r"[^aeiou]y$", last):
        forms.add(f"{last[:-1]}ies")
    elif not re.search(r"(s|x|z|ch|sh)$", last):
        forms.add(f"{last}s")
    return {(*first, form) for form in forms}


class Vocabulary:
    """Names of objects, found in texts.

    Args:
        lines: for each object its name, then its synonyms. A name that is written down goes before a plural of another.

    Raises:
        UserError: a name has no word, stands in two lines, or there is none.
    """

    def __init__(self, lines: Iterable[list[str]]):
        self.names: dict[tuple[str, ...], str] = {}  # words -> the object's first name
        for line in lines:
            for name in line:
                words = tuple(words_of(name))
                if not words or self.names.setdefault(words, line[0]) != line[0]:
                    problem = "is on two lines" if words else "has no letters"
                    raise UserError(f"the vocabulary's name {name!r} {problem}. Fix: write each name once")
        if not self.names:
            raise UserError("the vocabulary is empty. Fix: give it one name a line")
        self.objects = len(set(self.names.values()))
        for words, name in list(self.names.items()):
            for form in plurals(words):
                self.names.setdefault(form, name)
        self.longest = max(map(len, self.names))

    def canonical(self, name: str) -> str | None:
        """The first name of an object given by any of its names; None when it is not in the vocabulary."""
        return self.names.get(tuple(words_of(name)))

    def mentions(self, text: str) -> list[str]:
        """First names of all mentions in the order of the text: `dog`, `hot dog` of "Dogs eat a hot-dog."."""
        found = []
        for words in map(words_of, re.split(r"[.,;:!?\n]", text)):
            start = 0
            while start < len(words):
                for length in range(min(self.longest, len(words) - start), 0, -1):
                    name = self.names.get(tuple(words[start : start + length]))
                    if name is not None:
                        found.append(name)
                        break
                start += length if name is not None else 1
        return found


def vocabulary_of(names: Iterable[str]) -> Vocabulary:
    """All these names; one that is another's plural is not a second object."""
    unique = {tuple(words_of(name)) for name in names}
    many = {form for words in unique for form in plurals(words)}
    return Vocabulary([" ".join(words)] for words in sorted(unique - many))


class ObjectCounts(NamedTuple):
    """Mentions of a caption by first name, in order; an object named twice is there twice."""

    named: list[str]
    present: list[str]
    hallucinated: list[str]


def object_counts(caption: str, present: set[str], vocabulary: Vocabulary) -> ObjectCounts:
    """All mentions of a caption, those of objects that are present (by any of their names), and the others."""
    there = {vocabulary.canonical(name) for name in present}
    named = vocabulary.mentions(caption)
    return ObjectCounts(named, [n for n in named if n in there], [n for n in named if n not in there])


def harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def content_overlap(caption: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of different content words; 0 where a text has none."""
    ours, theirs = set(words_of(caption)) - STOP_WORDS, set(words_of(reference)) - STOP_WORDS
    shared = len(ours & theirs)
    precision, recall = shared / max(len(ours), 1), shared / max(len(theirs), 1)
    return precision, recall, harmonic(precision, recall)


def common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, all of `one` at a time: a bit for each word (Crochemore et al. 2001)."""
    places: dict[str, int] = {}
    for number, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << number
    every = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(one) - row.bit_count()


def rouge_l(caption: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 when a text has no words."""
    ours, theirs = words_of(caption), words_of(reference)
    common = common_length(ours, theirs)
    return harmonic(common / max(len(ours), 1), common / max(len(theirs), 1))


def repetition(words: list[str]) -> float:
    """Share of runs of four words that occurred before; 0 for fewer than four words."""
    runs = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def measure(
    caption: str, references: list[str], present: set[str] | None, vocabulary: Vocabulary | None
) -> tuple[Values, list[str]]:
    """Everything that is counted in one caption, and its hallucinated mentions.

    `present` holds first names; None when nothing is known about the image's objects.
    """
    words, hallucinated = words_of(caption), []
    values: Values = {
        "images": 1, "words": len(words), "distinct": len(set(words)), "repetition": repetition(words),
        "empty": float(not words),
    }  # fmt: skip
    if references:
        best = max((content_overlap(caption, reference) for reference in references), key=lambda overlap: overlap[2])
        values |= dict(zip(("precision", "recall", "f1"), best, strict=True), with_references=1)
        values["rouge_l"] = max(rouge_l(caption, reference) for reference in references)
    if present is not None and vocabulary is not None:
        counts = object_counts(caption, present, vocabulary)
        hallucinated = counts.hallucinated
        values |= {key: len(mentions) for key, mentions in counts._asdict().items()}
        values |= {"with_objects": 1, "hallucinates": float(bool(hallucinated))}
        values |= {"covered": len(set(counts.present)), "objects": len(present)}
    return values, hallucinated
