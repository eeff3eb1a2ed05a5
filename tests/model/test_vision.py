import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.image_processing_llava_uhd import patchify
from llava.model.vision import SliceEncoder

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=48, patch_size=8
    )
    encoder = SliceEncoder(config, -2, MEAN, STD).eval()
    for parameter in encoder.parameters():  # away from the initial near-zero position table
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def picture(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


def reference(encoder, image) -> torch.Tensor:
    """HF's CLIPVisionModel on one normalised image: hidden state -2 without CLS."""
    clip = CLIPVisionModel(CLIPVisionConfig(**encoder.config.to_diff_dict())).eval()
    clip.load_state_dict(encoder.clip.state_dict())
    pixels = (
        torch.tensor(list(image.get_flattened_data()), dtype=torch.float32).view(image.height, image.width, 3) / 255
    )
    pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    outputs = clip(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    return outputs.hidden_states[-2][0, 1:]


@pytest.mark.parametrize("size", [(48, 48), (64, 32), (24, 80)])
def test_equals_hugging_face_clip_at_any_shape(encoder, size):
    image = picture(*size)
    with torch.no_grad():
        ours = encoder(torch.from_numpy(patchify(image, 8)), [(size[1] // 8, size[0] // 8)])
        torch.testing.assert_close(ours, reference(encoder, image), atol=1e-5, rtol=1e-5)


def test_packed_slices_equal_single_ones_and_do_not_see_each_other(encoder):
    images = [picture(48, 48), picture(64, 32), picture(48, 48), picture(32, 64)]
    patches = [torch.from_numpy(patchify(image, 8)) for image in images]
    shapes = [(image.height // 8, image.width // 8) for image in images]
    with torch.no_grad():
        together = encoder(torch.cat(patches), shapes)
        counts = [rows * columns for rows, columns in shapes]
        for patch, shape, feature in zip(patches, shapes, together.split(counts), strict=True):
            torch.testing.assert_close(feature, encoder(patch, [shape]), atol=1e-5, rtol=1e-5)


def test_only_the_used_layers_run(encoder):
    ran = []
    for index, layer in enumerate(encoder.clip.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(torch.from_numpy(patchify(picture(48, 48), 8)), [(6, 6)])
    assert ran == [0, 1, 2]
    unused = {id(parameter) for parameter in encoder.unused_parameters()}
    assert {id(parameter) for parameter in encoder.clip.encoder.layers[3].parameters()} <= unused


def test_wrong_shapes_say_what_is_wrong(encoder):
    with pytest.raises(ValueError, match="36 patches, pixel_values holds 35"):
        encoder(torch.zeros(35, 192, dtype=torch.uint8), [(6, 6)])
    with pytest.raises(ValueError, match=r"wants \(patches, 192\)"):
        encoder(torch.zeros(36, 588, dtype=torch.uint8), [(6, 6)])
    with pytest.raises(ValueError, match=r"pixel_values is torch.float32; this tower wants bytes"):
        encoder(torch.zeros(36, 192), [(6, 6)])


def test_frozen_position_tables_are_kept_and_trained_ones_are_not(encoder):
    patches = torch.from_numpy(patchify(picture(64, 32), 8))
    encoder(patches, [(4, 8)])
    assert encoder.clip.embeddings.resized == {}
    encoder.requires_grad_(False)
    first = encoder(patches, [(4, 8)])
    assert list(encoder.clip.embeddings.resized) == [(4, 8)]
    torch.testing.assert_close(encoder(patches, [(4, 8)]), first)
