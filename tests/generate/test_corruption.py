"""Image corruptions: seeded, bounded, and each does what its name says."""

import importlib.util
import random

import numpy as np
import pytest
from PIL import Image

from llava.errors import UserError
from llava.generate.corruption import (
    CORRUPTIONS,
    check_corruptions,
    corrupt,
    gaussian_blur,
    imgaug_augmenters,
    mask,
    mirror_rotation,
)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(noise, name):
    before = noise.tobytes()
    drawn = [CORRUPTIONS[name](noise, random.Random(seed)) for seed in (1, 1, 2, 3, 4, 5)]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert len({image.tobytes() for image in drawn}) >= 2
    assert all(image.mode == "RGB" and image.tobytes() != before for image in drawn)
    assert noise.tobytes() == before


def test_the_mask_covers_between_a_quarter_and_35_percent_with_its_own_mean(noise):
    original = pixels(noise)
    for seed in range(25):
        masked = pixels(mask(noise, random.Random(seed)))
        colors, counts = np.unique(masked.reshape(-1, 3), axis=0, return_counts=True)
        fill = colors[counts.argmax()]
        covered = (masked == fill).all(axis=2)
        assert 0.245 <= covered.mean() <= 0.355
        assert np.array_equal(masked[~covered], original[~covered])
        assert np.abs(original[covered].mean(axis=0) - fill).max() <= 0.51


def test_the_mask_is_a_half_plane(noise):
    covered = (pixels(mask(noise, random.Random(3))) != pixels(noise)).any(axis=2)
    # the middle of any two covered pixels of a half-plane is covered; noise leaves a few pixels unchanged by chance
    rows, columns = covered.nonzero()
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, len(rows), (2, 500))
    between = covered[(rows[one] + rows[two]) // 2, (columns[one] + columns[two]) // 2]
    assert between.mean() > 0.97


def test_mirror_rotation_swaps_the_sides_and_is_undone_by_turning_back(noise):
    turned_back = set()
    for seed in range(20):
        turned = mirror_rotation(noise, random.Random(seed))
        assert turned.size == (60, 90)
        for back in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270):
            undone = turned.transpose(back).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if undone.tobytes() == noise.tobytes():
                turned_back.add(back)
                break
        else:
            raise AssertionError("no turn undoes it")
    assert len(turned_back) == 2


def test_mirror_rotation_is_a_mirror_image_by_hand():
    image = Image.fromarray(np.array([[[1] * 3, [2] * 3, [3] * 3], [[4] * 3, [5] * 3, [6] * 3]], dtype=np.uint8))
    # mirrored: 3 2 1 / 6 5 4; a quarter turn left: 1 4 / 2 5 / 3 6; a quarter turn right: 6 3 / 5 2 / 4 1
    seen = {str(np.asarray(mirror_rotation(image, random.Random(seed)))[..., 0].tolist()) for seed in range(20)}
    assert seen == {"[[1, 4], [2, 5], [3, 6]]", "[[6, 3], [5, 2], [4, 1]]"}


def test_blur_lowers_the_variance_and_keeps_the_mean(noise):
    blurred = gaussian_blur(noise, random.Random(0))
    assert blurred.size == noise.size
    assert pixels(blurred).var() < 0.05 * pixels(noise).var()
    assert pixels(blurred).mean() == pytest.approx(pixels(noise).mean(), abs=3)


def test_a_record_is_corrupted_in_one_way_drawn_from_the_given_names(noise):
    other = noise.transpose(Image.Transpose.ROTATE_90)
    name, images = corrupt([noise, other], ("mirror_rotation",), seed=5)
    assert (name, [image.size for image in images]) == ("mirror_rotation", [(60, 90), (90, 60)])
    drawn = {corrupt([noise], ("mask", "mirror_rotation"), seed)[0] for seed in range(20)}
    assert drawn == {"mask", "mirror_rotation"}


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_names(noise):
    for seed in range(5):
        name, [image] = corrupt([noise], ("mask", "gaussian_blur", "mirror_rotation"), seed)
        again, [same] = corrupt([noise], ("mirror_rotation", "mask", "gaussian_blur"), seed)
        assert (name, image.tobytes()) == (again, same.tobytes())


def test_unknown_names_are_refused_with_the_known_ones():
    assert check_corruptions("mask,color_jitter") == ("mask", "color_jitter")
    with pytest.raises(UserError, match="'msk'; known are gaussian_blur, color_jitter, mirror_rotation, mask"):
        check_corruptions("mask,msk")


# imgaug, where it is installed


def augmenters_or_skip():
    if importlib.util.find_spec("imgaug") is None:
        pytest.skip("the extra `aug` is not installed: imgaug WAS NOT TESTED")
    return imgaug_augmenters()


def test_an_augmenter_of_imgaug_is_named_seeded_and_in_the_lineage(noise):
    augmenters_or_skip()
    names = check_corruptions("imgaug:GaussianBlur(sigma=(3, 5)),imgaug:Fliplr(1.0)")
    assert names == ("imgaug:GaussianBlur(sigma=(3, 5))", "imgaug:Fliplr(1.0)")
    drawn = {seed: corrupt([noise], names, seed) for seed in range(12)}
    assert {name for name, _ in drawn.values()} == set(names)
    for seed, (name, [image]) in drawn.items():
        assert corrupt([noise], names, seed)[1][0].tobytes() == image.tobytes()
        if "Fliplr" in name:
            assert np.array_equal(np.asarray(image), np.asarray(noise)[:, ::-1])
    blurs = {image.tobytes() for name, [image] in drawn.values() if "Blur" in name}
    assert len(blurs) == sum("Blur" in name for name, _ in drawn.values())  # a sigma of its own for each seed


def test_the_two_gaussian_blurs_agree_but_imgaug_cuts_its_kernel_off(noise):
    """Its kernel is 2.6 to 3.3 sigma wide in all, Pillow's has no edge: imgaug's image keeps more of the texture."""
    augmenters = augmenters_or_skip()
    from PIL import ImageFilter

    image = noise.resize((180, 120), Image.Resampling.BICUBIC)
    inner = (slice(20, -20), slice(20, -20))  # borders are continued in different ways
    for sigma in (3.0, 4.0, 5.0):
        theirs = pixels(Image.fromarray(augmenters.GaussianBlur(sigma=sigma)(image=np.asarray(image))))[inner]
        ours = pixels(image.filter(ImageFilter.GaussianBlur(sigma)))[inner]
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.85
        assert np.abs(theirs.mean() - ours.mean()) < 1
        assert ours.std() < theirs.std() < pixels(image)[inner].std() / 2


@pytest.mark.parametrize(
    "name", ["imgaug:NoSuch", "imgaug:Fliplr(os.system('ls'))", "imgaug:Fliplr(nothing=1)", "imgaug:a.b"]
)
def test_what_imgaug_cannot_make_is_named(name):
    augmenters_or_skip()
    with pytest.raises(UserError, match="which imgaug cannot make"):
        check_corruptions(name)


def test_without_imgaug_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imgaug", None)
    with pytest.raises(UserError, match="run `bash training_scripts/setup"):
        check_corruptions("imgaug:Fliplr")
