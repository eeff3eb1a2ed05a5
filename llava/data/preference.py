"""Preference pairs as training samples: both answers of a pair side by side, its images once.

The batch is that of `collator.py` with 2 sequences a pair, chosen before rejected, and besides

    image_copies    int64    the images in the order in which the sequences show them: each pair's twice
    reference       list of (float, float), a pair each: log-probabilities of both answers under the reference model; no
                    tensor, which the Trainer would round to bfloat16 under DeepSpeed
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava.data.collator import Collator
from llava.data.dataset import ConversationDataset
from llava.errors import UserError
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from llava.pairs import read_pairs
from llava.records import Record

SIDES = ("chosen", "rejected")


def conversation_of(pair: Record, side: str) -> Record:
    """One side of a pair as a training record."""
    turns = [{"from": "human", "value": pair["prompt"]}, {"from": "gpt", "value": pair[side]}]
    return {**{key: pair[key] for key in ("id", "image") if key in pair}, "conversations": turns}


class PairDataset(Dataset):
    """Pairs of one or more files (see `llava/pairs.py`).

    Args: as of `ConversationDataset`.

    Attributes:
        sides: the answers as conversations, chosen and rejected of pair i at 2 i and 2 i + 1.
        reference: (pairs, 2) float64 log-probabilities; None until they are known.
    """

    def __init__(
        self,
        paths: list[str],
        processor: LlavaUHDProcessor | None,
        image_folder: str | None = None,
        max_length: int = 4096,
    ):
        self.pairs: list[Record] = []
        folders = []
        for path in paths:
            before = len(self.pairs)
            self.pairs += read_pairs(path)
            if len(self.pairs) == before:
                raise UserError(f"{path} holds no pairs. Fix: look at what quality_evaluation.pairs rejected")
            folders += [image_folder or str(Path(path).parent)] * (len(self.pairs) - before)
        ids = [pair["id"] for pair in self.pairs]
        if len(set(ids)) < len(ids):
            raise UserError(f"{', '.join(paths)} share ids. Fix: build the pairs of all sources with one command")
        records = [conversation_of(pair, side) for pair in self.pairs for side in SIDES]
        doubled = [folder for folder in folders for _ in SIDES]
        self.sides = ConversationDataset.of(records, doubled, processor, max_length)
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def check_images(self) -> None:
        for index in range(len(self)):
            self.sides.image_sizes(2 * index)

    def costs(self, sizes: np.ndarray, patch: float) -> list[float]:
        """Work of every pair in tokens: both sides, patches once.

        Args:
            sizes: of `sides.sizes()`.
            patch: work of a patch in tokens.
        """
        tokens = sizes[:, :2].sum(1).clip(max=self.sides.max_length)
        return (tokens[0::2] + tokens[1::2] + patch * sizes[0::2, 2]).tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A pair with both samples. `~index`: nothing to learn."""
        number = max(index, ~index)
        chosen = self.sides[2 * number if index >= 0 else ~(2 * number)]
        record = self.sides.records[2 * number + 1]
        ids, labels = self.sides.encode(record, self.sides.image_sizes(2 * number))
        rejected = {"id": record["id"], "input_ids": ids, "labels": labels if index >= 0 else [-100] * len(ids)}
        reference = (0.0, 0.0) if self.reference is None else self.reference[number]
        return {"id": record["id"], "chosen": chosen, "rejected": rejected, "reference": reference}


class PairCollator:
    """Joins pairs as above."""

    def __init__(self, pad_token_id: int, packing: bool = True):
        self.collate = Collator(pad_token_id, packing)

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate([pair[side] for pair in pairs for side in SIDES])
        order, shown = [], 0
        for pair in pairs:
            images = len(pair["chosen"].get("grids", ()))
            order += list(range(shown, shown + images)) * 2
            shown += images
        if order:
            batch["image_copies"] = torch.tensor(order)
        batch["ids"] = [pair["id"] for pair in pairs]
        batch["reference"] = [tuple(map(float, pair["reference"])) for pair in pairs]
        return batch
