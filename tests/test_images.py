"""From a file to upright RGB pixels, or to an error that names the file."""

import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.images import ImageError, find_image, image_size, load_image

ORIENTATION = 0x0112
# How an upright picture is stored so that orientation k shows it upright again (EXIF 2.32, tag 274).
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels, -1),
}


@pytest.fixture
def upright() -> np.ndarray:
    """4 rows, 6 columns; no two pixels alike."""
    return np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def pixels_of(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    assert image_size(path) == image.size
    return np.asarray(image).astype(int)


def message_of(function, path: Path) -> str:
    with pytest.raises(ImageError) as refused:
        function(path)
    return str(refused.value)


# Orientation


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright(tmp_path, upright, orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned.{kind.lower()}"
    lossless = {"lossless": True} if kind == "WEBP" else {}
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, kind, exif=exif, **lossless)
    assert np.array_equal(pixels_of(path), upright)


@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_of_a_jpeg(tmp_path, orientation):
    quarters = np.kron(np.array([[0, 80, 160], [240, 40, 120]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    upright = np.stack([quarters] * 3, axis=2)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, quality=100)
    assert load_image(path).size == (48, 32)
    assert np.abs(pixels_of(path) - upright).max() <= 2


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_changes_nothing(tmp_path, upright, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(upright).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "a.png"), upright)


# Transparency and colour


def test_transparent_pixels_lie_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 100, 51)])  # opaque, clear, one fifth
    image.save(tmp_path / "a.png")
    # 0.2 * 200 + 0.8 * 255 = 244; 0.8 * 255 = 204; 0.2 * 100 + 204 = 224
    expected = [[200, 0, 0], [255, 255, 255], [244, 204, 224]]
    assert np.abs(pixels_of(tmp_path / "a.png")[0] - expected).max() <= 1


def test_gray_with_alpha_lies_over_white(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 255), (100, 0)])
    image.save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").tolist() == [[[100] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour_lies_over_white(tmp_path, kind):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    path = tmp_path / "a.img"
    image.save(path, kind, transparency=2)
    assert pixels_of(path).tolist() == [[[10, 20, 30], [200, 100, 50], [255, 255, 255]]]


def test_a_palette_with_alpha_for_each_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=bytes([255, 51]))
    assert pixels_of(tmp_path / "a.png").tolist() == [[[10, 20, 30], [204, 204, 204]]]


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_single_transparent_colour_without_a_palette(tmp_path, mode, clear):
    image = Image.new(mode, (2, 1), clear)
    opaque = (9, 9, 9) if mode == "RGB" else 9
    image.putpixel((0, 0), opaque)
    image.save(tmp_path / "a.png", transparency=clear)
    assert pixels_of(tmp_path / "a.png").tolist() == [[[9, 9, 9], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("ink", "color"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk_is_shown_as_on_paper(tmp_path, ink, color):
    Image.new("CMYK", (8, 8), ink).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels_of(tmp_path / "a.jpg") - color).max() <= 3


def test_black_and_white(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path, kind):
    values = np.array([[0, 255, 256, 0x1234, 0x8000, 65535]], dtype=np.uint16)
    path = tmp_path / "a.img"
    Image.fromarray(values).save(path, kind)
    assert pixels_of(path)[0, :, 0].tolist() == [0, 0, 1, 0x12, 0x80, 255]


def test_sixteen_bit_gray_that_is_dark_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").max() == 0


def test_floating_point_pixels_are_refused_because_their_range_is_unknown(tmp_path):
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.array([[0.5, 1200.0]], dtype=np.float32)).save(path)
    message = message_of(load_image, path)
    assert "have no fixed range" in message
    assert str(path) in message


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 2
    assert pixels_of(path)[0, 0].tolist() == [255, 0, 0]


def test_the_content_decides_the_format_not_the_name(tmp_path, upright):
    Image.fromarray(upright).save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), upright)


# What is refused


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_truncated_jpeg_is_refused_by_name(tmp_path, share):
    data = jpeg()
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(share * len(data))])
    assert f"image {path} cannot be decoded" in message_of(load_image, path)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"<!DOCTYPE html><html><body>404 Not Found</body></html>"])
def test_files_that_are_no_image_are_refused_by_name(tmp_path, data):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert f"image {path} cannot be decoded" in message_of(load_image, path)
    assert f"image {path} cannot be read" in message_of(image_size, path)


def test_formats_beyond_the_known_ones_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert str(path) in message_of(load_image, path)


def test_a_header_that_claims_billions_of_pixels_is_refused(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))
    assert str(path) in message_of(load_image, path)
    assert str(path) in message_of(image_size, path)


def test_damaged_files_end_as_an_image_or_as_an_image_error(tmp_path):
    rng = random.Random(0)
    sources = [jpeg()]
    for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(jpeg())).save(buffer, kind)
        sources.append(buffer.getvalue())
    path = tmp_path / "damaged"
    read, messages = 0, []
    for number in range(600):
        data = bytearray(sources[number % len(sources)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(rng.choice((40, 400, len(data))))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(1, len(data))))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(path).mode == "RGB"
                read += 1
            except ImageError as error:
                messages.append(str(error))
    assert all(str(path) in message for message in messages)
    assert min(read, len(messages)) > 100  # both ends are exercised


# Names


def test_a_name_below_the_folder_is_found(tmp_path):
    (tmp_path / "a b").mkdir()
    path = tmp_path / "a b" / "ü.jpg"
    path.write_bytes(jpeg())
    assert find_image(tmp_path, "a b/ü.jpg") == path


@pytest.mark.parametrize("name", ["../outside.jpg", "a/../../outside.jpg", "/etc/passwd", "a\0.jpg", ".."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "outside.jpg").write_bytes(jpeg())
    with pytest.raises(ImageError) as refused:
        find_image(tmp_path / "folder", name)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", ["folder", ".", "fifo", "loop", "dangling"])
def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ImageError, match=r"is not a regular file|cannot be opened"):
        find_image(tmp_path, name)


@pytest.mark.parametrize("name", ["absent.jpg", "x" * 300, "file.jpg/below.jpg", "\ud800.jpg"])
def test_names_of_nothing_are_refused(tmp_path, name):
    (tmp_path / "file.jpg").write_bytes(jpeg())
    with pytest.raises(ImageError) as refused:
        find_image(tmp_path, name)
    assert ascii(name)[1:-1] in ascii(str(refused.value))


# Real files


@pytest.fixture
def photos(real_data) -> Path:
    folder = real_data / "photos"
    if not folder.is_dir():
        pytest.skip(f"no photos at {folder}; set SICOG_DATA to the data folder")
    return folder


def test_every_real_photo_loads_as_rgb_or_is_refused_by_name(photos):
    refused, read = {}, 0
    for path in sorted(photos.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".png", ".gif", ".tif"):
            continue
        try:
            image = load_image(path)
        except ImageError as error:
            refused[path] = str(error)
        else:
            assert image.mode == "RGB"
            assert image_size(path) == image.size
            read += 1
    assert [path.name for path in refused] == ["truncated.jpg"]
    assert all(str(path) in message for path, message in refused.items())
    assert read > 50


@pytest.mark.parametrize("motif", ["Landscape", "Portrait"])
def test_real_photos_of_one_motif_in_eight_orientations_look_alike(photos, motif):
    images = [load_image(photos / "exif_orientation" / f"{motif}_{number}.jpg") for number in range(1, 9)]
    assert len({image.size for image in images}) == 1
    small = [np.asarray(image.resize((60, 60))).astype(int) for image in images]
    # the number printed on each photo changes the mean by less than 1; a wrong turn changes it by more than 35
    assert max(np.abs(pixels - small[0]).mean() for pixels in small) < 5
