"""Exported folders, opened as a stranger opens them: in another process that cannot import this package."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.errors import UserError
from llava.model.assemble import assemble
from llava.model.export_hf import MODEL_FOLDER, SOURCES, export, standalone
from llava.model.load import load_model, load_processor
from llava.model.verify import verify

WEIGHTS = Path(__file__).parents[2] / "llava" / "toy" / "weights"


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "uhd")


@pytest.fixture(scope="session")
def exported_stock(low_resolution, tmp_path_factory):
    return export(low_resolution, tmp_path_factory.mktemp("exported") / "stock")


def test_uhd_folder_in_a_process_without_this_package(checkpoint, exported):
    seen = verify(checkpoint, exported, serve=False)
    assert list(seen) == ["strict load", "pixels", "logits", "token counts"]


def test_low_resolution_folder_is_a_stock_llava(low_resolution, exported_stock):
    verify(low_resolution, exported_stock, serve=False)
    assert json.loads((exported_stock / "config.json").read_text())["architectures"] == [
        "LlavaForConditionalGeneration"
    ]
    assert not list(exported_stock.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uhd", "stock"])
def test_transformers_serve_answers_as_the_checkpoint(request, kind):
    names = {"uhd": ("checkpoint", "exported"), "stock": ("low_resolution", "exported_stock")}[kind]
    checkpoint, folder = map(request.getfixturevalue, names)
    assert "as the checkpoint does" in verify(checkpoint, folder)["transformers serve"]


def test_a_changed_weight_is_found(checkpoint, exported, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.projector.proj"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits that differ by"):
        verify(checkpoint, folder, serve=False)


@pytest.mark.parametrize("size", [(48, 48), (50, 49), (337, 336), (31, 200), (640, 427)])
def test_square_pixels_are_those_of_transformers_clip_processor(low_resolution, exported_stock, size):
    from transformers import LlavaProcessor

    image = Image.effect_noise(size, 80).convert("RGB")
    stock = LlavaProcessor.from_pretrained(exported_stock).image_processor(image, return_tensors="np")["pixel_values"][
        0
    ]
    ours = load_processor(low_resolution).image_processor
    config = load_model(low_resolution, torch.float32).config
    square = (np.asarray(ours.cut(image)[0]) / 255 - config.image_mean) / config.image_std
    np.testing.assert_allclose(stock, square.transpose(2, 0, 1), atol=1e-5)


def test_an_image_token_outside_the_vocabulary_gets_a_row_that_is_never_said(llama, tmp_path):
    from transformers import LlavaForConditionalGeneration

    folder = assemble(WEIGHTS / "clip", llama, tmp_path / "low", projector_type="mlp2x_gelu")
    source, stock = load_model(folder, torch.float32), export(folder, tmp_path / "stock")
    model = LlavaForConditionalGeneration.from_pretrained(stock, dtype=torch.float32)
    image_token, padding = source.config.image_token_id, source.config.pad_token_id
    assert model.lm_head.weight.shape[0] == image_token + 1 == source.lm_head.weight.shape[0] + 1
    assert torch.equal(model.lm_head.weight[image_token], model.lm_head.weight[padding])
    verify(folder, stock, serve=False)


@pytest.mark.parametrize("name", SOURCES)
def test_source_files_stand_alone(name):
    source = standalone((MODEL_FOLDER / f"{name}.py").read_text())
    assert "from llava" not in source
    assert not re.search(r"^Auto\w+\.register\(", source, flags=re.MULTILINE)


@pytest.mark.parametrize("line", ["import llava.images", "def f():\n    import llava", "from llava import images"])
def test_other_imports_of_the_package_are_refused(line):
    with pytest.raises(ValueError, match="imports llava"):
        standalone(line)


def test_an_existing_folder_and_a_folder_that_is_no_checkpoint_are_refused(checkpoint, exported, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export(checkpoint, exported)
    with pytest.raises(UserError, match=r"no config\.json"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_open_is_named(checkpoint, exported, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json. Fix: name a folder written by"):
        verify(checkpoint, tmp_path)
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(UserError, match="does not open in a fresh process"):
        verify(checkpoint, tmp_path, serve=False)


def test_a_foreign_source_file_is_not_run(checkpoint, exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    marker = tmp_path / "ran"
    with (tmp_path / "slicing.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w')\n")
    with pytest.raises(UserError, match=r"slicing\.py is not the file this package exports"):
        verify(checkpoint, tmp_path, serve=False)
    assert not marker.exists()


def test_announced_tokens_for_images(processor):
    sizes = [(48, 48), (100, 84), (48, 336)]  # (height, width)
    told = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert told["num_image_tokens"] == [len(processor.image_ids(width, height)) for height, width in sizes]
    batch = processor(images=[Image.new("RGB", (w, h)) for h, w in sizes], text=["<image>"] * 3)
    assert sum(told["num_image_patches"]) == len(batch["pixel_values"])


def test_token_types_mark_the_whole_image(processor):
    image = Image.new("RGB", (72, 48))
    batch = processor(images=[image], text=["Hi <image> there", "no image at all"], return_mm_token_type_ids=True)
    assert batch["mm_token_type_ids"].sum(1).tolist() == [len(processor.image_ids(72, 48)), 0]
