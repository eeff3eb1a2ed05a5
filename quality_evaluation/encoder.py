"""Sentence encoders for the consistency score: texts -> unit vectors.

`hashing` is the embedded default: no download, no weights, words and word pairs hashed to a fixed width. Anything else
is a sentence-transformers folder (extra `embed`). The paper used NV-Embed-v2.
"""

import itertools
import math
import re
from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llava.errors import UserError
from quality_evaluation.consistency import unit

WIDTH = 4096


class HashingEncoder:
    """Bag of hashed words, word pairs and triples with logarithmic counts; order matters through pairs and triples."""

    name = "hashing"

    def encode(self, texts: list[str]) -> np.ndarray:
        """(len(texts), 4096) float32, rows of length 1; an empty text gives a zero row."""
        vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            grams = Counter(words)
            grams.update(" ".join(pair) for pair in itertools.pairwise(words))
            grams.update(" ".join(triple) for triple in zip(words, words[1:], words[2:], strict=False))
            for gram, count in grams.items():
                position, sign = bucket(gram)
                vectors[row, position] += sign * (1 + math.log(count))
        return unit(vectors).astype(np.float32)


@lru_cache(maxsize=1 << 18)
def bucket(gram: str) -> tuple[int, int]:
    number = int.from_bytes(blake2b(gram.encode(), digest_size=8).digest(), "big")
    return number % WIDTH, 1 if number >> 63 else -1


class SentenceEncoder:
    """A sentence-transformers model from a local folder; code in the folder is not run."""

    def __init__(self, folder: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "a sentence-transformers encoder needs the extra `embed`. Fix: pip install -e '.[embed]', or use hashing"
            ) from error
        self.name = folder
        self.model = SentenceTransformer(folder, trust_remote_code=False, local_files_only=True)

    def encode(self, texts: list[str]) -> np.ndarray:
        """(len(texts), d) float32, rows of length 1. Identical texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        vectors = self.model.encode(unique, normalize_embeddings=True, show_progress_bar=False)
        place = {text: index for index, text in enumerate(unique)}
        return vectors[[place[text] for text in texts]]


def open_encoder(name: str) -> HashingEncoder | SentenceEncoder:
    """`hashing`, or the folder of a sentence-transformers model."""
    if name == "hashing":
        return HashingEncoder()
    if not Path(name).is_dir():
        raise UserError(f"encoder {name!r} is neither `hashing` nor a folder. Fix: set ENCODER_MODEL_NAME_OR_PATH")
    return SentenceEncoder(name)
