"""Self-consistency: how well a record's candidates agree with each other, and which one to keep.

Pure functions; n candidates, d embedding dimensions. The published score of a candidate is its mean cosine with all
candidates, itself included ("minimum Bayes risk", paper step 3); with unit vectors that is a dot product with the mean
vector, so it is linear in n.
"""

import random
import re

import numpy as np


def unit(embeddings: np.ndarray) -> np.ndarray:
    """(..., d) rows scaled to length 1; zero rows stay zero. Rows that have it already are given back as they are."""
    lengths = np.sqrt(np.einsum("...d,...d->...", embeddings, embeddings))[..., None]
    if embeddings.dtype == np.float32 and (np.abs(lengths - 1) < 1e-6).all():
        return embeddings
    return embeddings / np.where(lengths == 0, 1, lengths)


def mean_cosine(embeddings: np.ndarray) -> np.ndarray:
    """(..., n) mean cosine of each candidate with all candidates, itself included: the published score. (..., n, d) in.

    >>> mean_cosine(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).round(3).tolist()
    [0.667, 0.667, 0.333]
    """
    vectors = unit(embeddings)
    return (vectors @ vectors.mean(axis=-2)[..., None])[..., 0]


def leave_one_out(embeddings: np.ndarray) -> np.ndarray:
    """(..., n) mean cosine of each candidate with the others; comparable between different n. Needs n >= 2."""
    vectors = unit(embeddings)
    own = (vectors * vectors).sum(axis=-1)  # 1, or 0 for an empty text
    return ((vectors @ vectors.sum(axis=-2)[..., None])[..., 0] - own) / (vectors.shape[-2] - 1)


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """(..., n, n) cosine of each candidate with each."""
    vectors = unit(embeddings)
    return vectors @ np.swapaxes(vectors, -1, -2)


def vote(answers: list[str]) -> np.ndarray:
    """(n,) share of the candidates that give the same short answer, after `normal`."""
    keys = [normal(answer) for answer in answers]
    return np.array([keys.count(key) / len(keys) for key in keys])


def normal(answer: str) -> str:
    """A short answer without case, punctuation at its ends, articles before a word, and extra blanks."""
    answer = re.sub(r"\s+", " ", answer.lower()).strip(" .,:;!?\"'()*")
    return re.sub(r"\b(a|an|the) (?=\S)", "", answer)


def best(scores: np.ndarray) -> int:
    """Index of the highest score; the first of equals."""
    return int(np.argmax(scores))


def pick_rejected(texts: list[str], scores: np.ndarray, chosen: int, seed: int) -> int | None:
    """A candidate from the lower half by score (floor(n/2) of them), drawn with `seed`, that differs from the chosen.

    None when no candidate of the lower half differs.
    """
    order = np.argsort(scores, kind="stable")
    winner = texts[chosen].strip()
    lower = [int(index) for index in order[: len(texts) // 2] if texts[index].strip() != winner]
    return random.Random(seed).choice(lower) if lower else None
