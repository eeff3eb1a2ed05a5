"""Packs: every sample once, rows of equal work, the same step for any number of ranks."""

import random

import pytest

from llava.data.packing import PackSampler, balance

# (LM tokens of text, images) as the stages see them: overview-only captions; captions of sliced images with long
# texts; the instruction mix with short answers, long conversations and text-only rows
STAGES = ("align", "pretrain", "instruct")


def lengths_of(stage: str, count: int) -> list[int]:
    rng = random.Random(stage)
    sliced = [144, 445, 457, 589, 613, 745, 877, 889, 1033, 1177, 1237]
    if stage == "align":
        return [144 + 30 + int(rng.lognormvariate(3.0, 0.5)) for _ in range(count)]
    if stage == "pretrain":
        return [rng.choice(sliced) + 60 + int(rng.lognormvariate(5.6, 0.5)) for _ in range(count)]
    return [
        int(rng.lognormvariate(5.5, 0.9))
        if rng.random() < 0.08
        else rng.choice(sliced) + int(rng.lognormvariate(5.0, 0.8))
        for _ in range(count)
    ]


def test_hand_worked_split():
    # 8+7 | 6+5+4 would be 15 | 15; differencing finds 16 | 14, the textbook example
    groups = balance([8, 7, 6, 5, 4], 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in group) for group in groups) == [14, 16]


@pytest.mark.parametrize("packs", [1, 2, 3, 7])
def test_nothing_is_lost_and_nothing_empty(packs):
    rng = random.Random(packs)
    for _ in range(50):
        costs = [rng.randint(1, 1000) for _ in range(rng.randint(packs, 40))]
        groups = balance(costs, packs)
        assert sorted(index for group in groups for index in group) == list(range(len(costs)))
        assert all(groups)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("per_device", "accumulation", "world"), [(4, 1, 32), (8, 1, 32), (4, 4, 8), (4, 32, 1)])
def test_ranks_wait_for_less_than_three_percent(stage, per_device, accumulation, world):
    costs = [min(length, 4096) for length in lengths_of(stage, 128 * 40)]  # --max_length cuts the rest
    sampler = PackSampler(costs, per_device * accumulation * world, accumulation, 0, world, seed=0)
    assert sampler.fill() >= 0.97


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (2, 2), (1, 4), (3, 1)])
def test_each_sample_once_an_epoch_over_all_ranks(accumulation, world):
    costs = lengths_of("instruct", 101)
    ranks = [PackSampler(costs, 12 * accumulation, accumulation, rank, world, seed=1) for rank in range(world)]
    packs = [list(rank) for rank in ranks]
    assert {len(own) for own in packs} == {len(ranks[0])}  # ranks stay in step
    learned = [index for own in packs for pack in own for index in pack if index >= 0]
    assert sorted(learned) == list(range(101))


def test_a_step_holds_the_same_samples_for_any_number_of_ranks():
    costs = lengths_of("instruct", 96)

    def steps(accumulation, world):
        ranks = [list(PackSampler(costs, 24, accumulation, rank, world, seed=3)) for rank in range(world)]
        starts = range(0, len(ranks[0]), accumulation)
        return [sorted(i for own in ranks for pack in own[s : s + accumulation] for i in pack) for s in starts]

    assert steps(1, 1) == steps(4, 1) == steps(1, 4) == steps(2, 2)


def test_a_rank_without_a_sample_gets_one_with_nothing_to_learn():
    ranks = [list(PackSampler([5, 6, 7, 8, 9], 4, 1, rank, 4, seed=0)) for rank in range(4)]
    last = [own[-1] for own in ranks]
    assert [len(pack) for pack in last] == [1, 1, 1, 1]
    assert sum(pack[0] < 0 for pack in last) == 3
    assert {max(pack[0], ~pack[0]) for pack in last} == {max(last[0][0], ~last[0][0])}


def test_order_is_a_function_of_seed_and_epoch():
    sampler = PackSampler(lengths_of("instruct", 64), 16, 2, 0, 1, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert len(sampler) == len(first) == 8
