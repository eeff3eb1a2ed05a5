"""Sentence encoders for the consistency score: texts -> unit vectors.

    hashing              the embedded default: no download, no weights; words, pairs and triples hashed to a fixed width
    a folder             a sentence-transformers model (extra `embed`)
    http://.../v1        any server with an embeddings endpoint; `model` names its model

The paper used NV-Embed-v2 (CC-BY-NC-4.0, and its code wants an older transformers): serve it and give its address with
`preset nv-embed-v2`, which ends each text as published. What a server or a folder gave is kept on disk by content.
"""

import itertools
import math
import os
import re
import time
from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from llava.errors import UserError
from llava.records import write_atomically
from quality_evaluation.consistency import unit

WIDTH = 4096
TOKENS = {"cuda": 16_384, "cpu": 512}  # of a batch, padding included: what a device's caches like
PRESETS = {"nv-embed-v2": "</s>"}  # what is put at the end of each text


class Encoder(Protocol):
    """`name` identifies the vectors in a cache; `encode` gives (len(texts), d) float32 rows of length 1."""

    name: str

    def encode(self, texts: list[str]) -> np.ndarray: ...


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
    """A sentence-transformers model from a local folder; code in the folder is not run. bfloat16 on a GPU."""

    def __init__(self, folder: str, suffix: str = "", max_tokens: int | None = None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "a sentence-transformers encoder needs the extra `embed`. Fix: run `bash training_scripts/setup.sh embed`"
            ) from error
        import torch

        from llava.runs import fingerprint, local_rank

        cuda = torch.cuda.is_available()
        self.suffix = suffix
        self.name = f"{fingerprint(Path(folder))}{suffix}{max_tokens or ''}"
        self.model = SentenceTransformer(
            folder, trust_remote_code=False, local_files_only=True, device=f"cuda:{local_rank()}" if cuda else "cpu",
            model_kwargs={"dtype": torch.bfloat16} if cuda else None,
        )  # fmt: skip
        if max_tokens:
            self.model.max_seq_length = max_tokens

    def encode(self, texts: list[str]) -> np.ndarray:
        lengths = [len(ids) for ids in self.model.tokenizer([text + self.suffix for text in texts])["input_ids"]]
        vectors: list = [None] * len(texts)
        for batch in batches(lengths, self.model.max_seq_length or max(lengths), TOKENS[self.model.device.type]):
            encoded = self.model.encode(
                [texts[index] + self.suffix for index in batch], batch_size=len(batch), normalize_embeddings=True,
                show_progress_bar=False,
            )  # fmt: skip
            for index, vector in zip(batch, encoded, strict=True):
                vectors[index] = vector
        return np.stack(vectors).astype(np.float32)


def batches(lengths: list[int], longest: int, tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, each of at most `tokens` tokens with its padding."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            found.append([])
            room = max(tokens // max(min(lengths[index], longest), 1), 1)
        found[-1].append(index)
        room -= 1
    return found


class ServedEncoder:
    """An embeddings endpoint; 64 texts a request, many requests in flight."""

    def __init__(self, url: str, model: str, suffix: str = ""):
        if not model:
            raise UserError("an embeddings server needs --encoder_model: the name under which it knows its model")
        self.url, self.model, self.suffix = url, model, suffix
        self.name = f"{model}{suffix}"

    def encode(self, texts: list[str]) -> np.ndarray:
        from llava.endpoint import Endpoint, each

        endpoint, vectors = Endpoint(self.url, self.model), {}

        def done(start: int, rows: list[list[float]]) -> None:
            vectors[start] = np.array(rows, dtype=np.float32)

        def ask(start: int):
            return endpoint.embed([text + self.suffix for text in texts[start : start + 64]])

        each(range(0, len(texts), 64), ask, done, concurrency=16)
        return unit(np.concatenate([vectors[start] for start in sorted(vectors)])).astype(np.float32)


class CachedEncoder:
    """Keeps what another encoder gave in a folder, by content: a text is encoded once, in this run and the next.

    Every process writes a file of its own and reads all of them, so that ranks may encode their shares beforehand, and
    runs may share a folder.
    """

    def __init__(self, inner: Encoder, folder: Path, rank: int = 0):
        self.inner, self.name = inner, inner.name
        self.folder = folder / blake2b(inner.name.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own = f"rank{rank:05d}-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}"
        self.places: dict[bytes, tuple[str, int]] = {}  # text -> (file, row)
        self.width = 0
        self.read_all()

    def read_all(self) -> None:
        """Find what all ranks have kept; a torn last row is left out."""
        for keys in sorted(self.folder.glob("*.keys")):
            data = keys.read_bytes()
            vectors = keys.with_suffix(".vectors")
            width_file = self.folder / "width"
            if not width_file.is_file() or not vectors.is_file():
                continue
            self.width = int(width_file.read_text())
            rows = min(len(data) // 16, vectors.stat().st_size // (4 * self.width))
            for row in range(rows):
                self.places.setdefault(data[16 * row : 16 * row + 16], (keys.stem, row))

    def encode(self, texts: list[str]) -> np.ndarray:
        keys = [key_of(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.places}
        if missing:
            self.keep(list(missing), self.inner.encode(list(missing.values())))
        files = {}
        for name in {self.places[key][0] for key in keys}:
            path = self.folder / f"{name}.vectors"
            rows = path.stat().st_size // (4 * self.width)  # a torn last row is left out
            files[name] = np.memmap(path, np.float32, "r", shape=(rows, self.width))
        return np.stack([files[file][row] for file, row in (self.places[key] for key in keys)])

    def keep(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self.width = vectors.shape[1]
        if not (self.folder / "width").is_file():
            write_atomically(self.folder / "width", [str(self.width)])
        path = self.folder / f"{self.own}.vectors"
        row = path.stat().st_size // (4 * self.width) if path.is_file() else 0
        with path.open("ab") as file:
            file.write(vectors.astype(np.float32).tobytes())
        with path.with_suffix(".keys").open("ab") as file:  # second: a key without its vector must not exist
            file.write(b"".join(keys))
        for number, key in enumerate(keys):
            self.places[key] = self.own, row + number


def key_of(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def open_encoder(
    name: str,
    model: str = "",
    preset: str = "",
    max_tokens: int | None = None,
    cache: Path | None = None,
    rank: int = 0,
) -> Encoder:
    """`hashing`, the folder of a sentence-transformers model, or the address of an embeddings server."""
    if preset and preset not in PRESETS:
        raise UserError(f"--encoder_preset is {preset!r}; known are {', '.join(PRESETS)}")
    if name == "hashing":
        return HashingEncoder()
    if name.startswith(("http://", "https://")):
        if max_tokens:
            raise UserError("--max_tokens is for a folder; a server cuts texts as it was started. Fix: drop it")
        inner: Encoder = ServedEncoder(name, model, PRESETS.get(preset, ""))
    elif Path(name).is_dir():
        inner = SentenceEncoder(name, PRESETS.get(preset, ""), max_tokens)
    else:
        raise UserError(
            f"encoder {name!r} is neither `hashing`, nor a folder, nor an address. Fix: set ENCODER_MODEL_NAME_OR_PATH"
        )
    return CachedEncoder(inner, cache, rank) if cache else inner
