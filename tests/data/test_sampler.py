from llava.data.sampler import LengthGroupedSampler


def test_every_sample_once_and_the_epoch_decides_the_order():
    lengths = [(7 * index) % 50 for index in range(103)]
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(103))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(103))
    assert second != first
    resumed = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_batches_hold_similar_lengths():
    lengths = [(37 * index) % 400 for index in range(400)]
    order = list(LengthGroupedSampler(lengths, batch_size=4, seed=0))
    spread = [max(batch) - min(batch) for batch in zip(*[iter([lengths[i] for i in order])] * 4, strict=True)]
    assert sum(spread) / len(spread) < 40  # about 240 in random order
