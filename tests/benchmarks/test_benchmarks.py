"""The speed that is claimed, asserted with the equality that comes with it."""

import pytest

from tests.benchmarks.model import bench_encoder, bench_pixels, bench_resampler

pytestmark = pytest.mark.slow


def test_images_become_patches_at_twice_the_speed():
    assert bench_pixels() > 2


def test_resampler_is_half_as_fast_again():
    assert bench_resampler() > 1.5


def test_encoder_without_padding_is_faster():
    assert bench_encoder() > 1
