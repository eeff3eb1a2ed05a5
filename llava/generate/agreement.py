"""How well a record's candidates agree so far: what adaptive sampling stops on. Standard library only."""

import itertools
import math
import re
from collections import Counter

from llava.prompts import final_answer, final_description


def agreement(texts: list[str], kind: str) -> float:
    """Mean cosine of two or more texts with each other, over words and pairs of words, in the parts that are compared.

    Args:
        kind: `caption` compares final descriptions, `reasoning` final answers.

    >>> agreement(["red square", "red square", "red circle"], "caption").__round__(3)
    0.556
    """
    compared = final_description if kind == "caption" else final_answer
    vectors = [gram_counts(compared(text)) for text in texts]
    pairs = list(itertools.combinations(vectors, 2))
    return sum(cosine(one, other) for one, other in pairs) / len(pairs)


def gram_counts(text: str) -> Counter[str]:
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(" ".join(pair) for pair in itertools.pairwise(words))


def cosine(one: Counter[str], other: Counter[str]) -> float:
    lengths = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(count * other[gram] for gram, count in one.items()) / lengths if lengths else 0.0
