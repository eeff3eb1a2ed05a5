"""Samples -> one batch. The batch contract, written here and nowhere else:

    input_ids       int64  (1, T)      all samples one after another; image placeholders already expanded
    position_ids    int64  (1, T)      from 0 in every sample
    cu_seq_lens     int32  (S + 1,)    where each sample starts and ends: attention never crosses
    labels          int64  (1, T)      -100 where nothing is learned, and on the first token of every sample
    pixel_values    uint8  (P, 3*p*p)  all patches of all slices of all images of the batch, in order
    slice_shapes    int64  (N, 2)      rows and columns of patches per slice; an image's overview comes last
    grids           int64  (I, 2)      rows and columns of slices per image; (0, 0) for overview only
    ids             list of str (S)    of the records

The image tensors are absent when the batch has no image. N = sum over images of rows*columns + 1.

With `packing` off, the samples are rows of their own, padded on the right to the longest:

    input_ids, labels, attention_mask  int64  (S, T)    no position_ids, no cu_seq_lens
"""

from typing import Any

import torch

from llava.model.processing_llava_uhd import pad

IMAGE_KEYS = ("pixel_values", "slice_shapes", "grids")


class Collator:
    """Joins samples as above; keeps nothing else of them."""

    def __init__(self, pad_token_id: int, packing: bool = True):
        self.pad_token_id, self.packing = pad_token_id, packing

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.packed(samples) if self.packing else self.padded(samples)
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch.update({key: torch.cat([sample[key] for sample in with_images]) for key in IMAGE_KEYS})
        batch["ids"] = [sample["id"] for sample in samples]
        return batch

    def packed(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        # a sample's first token has no predecessor of its own
        labels = [label for sample in samples for label in [-100, *sample["labels"][1:]]]
        return {
            "input_ids": torch.tensor([[token for sample in samples for token in sample["input_ids"]]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            "labels": torch.tensor([labels]),
        }

    def padded(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad([sample["input_ids"] for sample in samples], self.pad_token_id, "right")
        batch["labels"] = pad([sample["labels"] for sample in samples], -100, "right")["input_ids"]
        return batch
