"""The order of training samples: a function of seed and epoch alone, so that a resumed run sees what it would have."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava.seeds import seed_of


class LengthGroupedSampler(Sampler[int]):
    """Every sample once per epoch, in random order, neighbours of similar length.

    Args:
        lengths: tokens of each sample.
        batch_size: samples that are used together, over all ranks and accumulation steps.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
