"""Samples -> one batch. The batch contract, written here and nowhere else:

    input_ids       int64  (B, T)      right-padded; image placeholders already expanded
    attention_mask  int64  (B, T)      1 on real tokens
    labels          int64  (B, T)      -100 where nothing is learned
    pixel_values    uint8  (P, 3*p*p)  all patches of all slices of all images of the batch, in order
    slice_shapes    int64  (N, 2)      rows and columns of patches per slice; an image's overview comes last
    grids           int64  (I, 2)      rows and columns of slices per image; (0, 0) for overview only

The last three are absent when the batch has no image. N = sum over images of rows*columns + 1.
"""

from typing import Any

import torch

from llava.model.processing_llava_uhd import pad

IMAGE_KEYS = ("pixel_values", "slice_shapes", "grids")


class Collator:
    """Pads and concatenates; keeps nothing else of a sample."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad([sample["input_ids"] for sample in samples], self.pad_token_id, "right")
        batch["labels"] = pad([sample["labels"] for sample in samples], -100, "right")["input_ids"]
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch.update({key: torch.cat([sample[key] for sample in with_images]) for key in IMAGE_KEYS})
        return batch
