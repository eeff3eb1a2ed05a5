"""The speed that is claimed, asserted with the equality that comes with it."""

import pytest

from tests.benchmarks.client import bench_client
from tests.benchmarks.curation import bench_encoding, bench_scoring
from tests.benchmarks.generation import bench_generation
from tests.benchmarks.model import bench_encoder, bench_pixels, bench_resampler
from tests.benchmarks.training import bench_memory, bench_step, bench_trainers

pytestmark = pytest.mark.slow


def test_images_become_patches_at_twice_the_speed():
    assert bench_pixels() > 2


def test_resampler_is_half_as_fast_again():
    assert bench_resampler() > 1.5


def test_encoder_without_padding_is_faster():
    assert bench_encoder() > 1


def test_a_training_step_is_three_times_as_fast_in_half_the_memory():
    assert bench_step(rounds=1) > 3
    assert bench_memory() < 0.5


def test_training_is_twice_as_fast_as_with_the_trainers_people_use():
    assert all(ratio > 2 for ratio in bench_trainers(steps=1).values())


def test_six_candidates_an_image_are_five_times_as_fast_as_by_generate():
    assert all(ratio > 5 for ratio in bench_generation(rounds=1).values())


def test_the_client_is_twenty_times_as_fast_as_two_threads():
    assert bench_client() > 20


def test_curation_is_faster_where_the_other_side_is_installed():
    scoring, encoding = bench_scoring(rounds=1), bench_encoding(rounds=1)
    assert scoring is None or scoring > 2.5
    assert encoding is None or encoding > 1.25
