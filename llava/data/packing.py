"""Which samples train together: whole samples side by side in one row, no padding, rows of equal work.

Every optimizer step sees `samples_per_step` samples, the same ones for any number of ranks. They are split into one
pack per rank and accumulation step so that the largest pack is as small as can be found; a pack is one row of the
model (see `collator.py`). No sample is split, lost or seen twice in an epoch.
"""

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.seeds import seed_of


def balance(costs: Sequence[float], packs: int) -> list[list[int]]:
    """Split indices of `costs` into `packs` groups of nearly equal sum (Karmarkar and Karp's largest differencing).

    Repeatedly the two partial splits that differ most within themselves are merged, heavy groups with light ones.
    With at least as many costs as packs no group is empty.
    """
    heap = []
    for number, cost in enumerate(costs):
        groups = [(cost, [number])] + [(0.0, [])] * (packs - 1)  # heaviest first
        heap.append((-cost, number, groups))
    heapq.heapify(heap)
    number = len(costs)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, one + two) for (a, one), (b, two) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda group: -group[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
        number += 1
    return [sorted(indices) for _, indices in heap[0][2]]


class PackSampler(Sampler[list[int]]):
    """Yields this rank's packs: lists of sample indices, one pack per micro-batch.

    Args:
        costs: work of each sample (tokens, and patches at their share).
        samples_per_step: samples of one optimizer step over all ranks.
        accumulation: micro-batches per optimizer step.
        rank, world_size: which packs are ours. Packs of one micro-batch are neighbours in size on all ranks.

    The last step of an epoch may have fewer samples. A pack that would then be empty holds `~index`: that sample
    again with nothing to learn from it, so that every rank takes part.
    """

    def __init__(
        self, costs: Sequence[float], samples_per_step: int, accumulation: int, rank: int, world_size: int, seed: int
    ):
        self.costs, self.samples_per_step, self.accumulation = list(costs), samples_per_step, accumulation
        self.rank, self.world_size, self.seed, self.epoch = rank, world_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.costs) // self.samples_per_step) * self.accumulation

    def steps(self) -> Iterator[list[list[int]]]:
        """The packs of every optimizer step, heaviest first; a function of seed and epoch alone."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        packs = self.accumulation * self.world_size
        for start in range(0, len(order), self.samples_per_step):
            chosen = order[start : start + self.samples_per_step]
            groups = balance([self.costs[index] for index in chosen], packs)
            yield [[chosen[position] for position in group] or [~chosen[0]] for group in groups]

    def __iter__(self) -> Iterator[list[int]]:
        for packs in self.steps():
            yield from packs[self.rank :: self.world_size]

    def fill(self) -> float:
        """Share of the work that is not waiting: mean pack over the heaviest pack of its micro-batch, one epoch."""
        work = waiting = 0.0
        for packs in self.steps():
            sizes = [sum(self.costs[index] for index in pack if index >= 0) for pack in packs]
            for start in range(0, len(sizes), self.world_size):
                work += sum(sizes[start : start + self.world_size])
                waiting += max(sizes[start : start + self.world_size]) * self.world_size
        return work / waiting
