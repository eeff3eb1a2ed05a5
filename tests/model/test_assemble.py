import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, CLIPVisionModel

from llava.errors import UserError
from llava.model.assemble import assemble
from llava.model.load import check_checkpoint, load_model, load_processor

WEIGHTS = Path(__file__).parents[2] / "llava" / "toy" / "weights"


def test_tower_and_language_model_are_copied(checkpoint, model):
    clip = CLIPVisionModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    language = AutoModelForCausalLM.from_pretrained(WEIGHTS / "qwen2", dtype=torch.float32)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(model.model.vision_tower.clip.state_dict()[name], tensor), name
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied, as in the language model's folder


def test_full_clip_folder_in_the_published_layout_is_accepted(tmp_path):
    vision = json.loads((WEIGHTS / "clip" / "config.json").read_text())
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    clip = CLIPModel(config).float()
    clip.save_pretrained(tmp_path / "clip")
    output = assemble(tmp_path / "clip", WEIGHTS / "qwen2", tmp_path / "out", resampler_grid=3)
    tower = load_model(output, torch.float32).model.vision_tower.clip
    torch.testing.assert_close(tower.pre_layrnorm.weight, clip.vision_model.pre_layrnorm.weight)
    torch.testing.assert_close(
        tower.embeddings.position_embedding.weight, clip.vision_model.embeddings.position_embedding.weight
    )


def test_published_projector_file_is_read_strictly(tmp_path, checkpoint):
    projector = load_model(checkpoint, torch.float32).model.projector
    tensors = {f"model.mm_projector.{name}": torch.randn_like(t) for name, t in projector.state_dict().items()}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    output = assemble(
        WEIGHTS / "clip", WEIGHTS / "qwen2", tmp_path / "out", resampler_grid=3, projector=tmp_path / "mm_projector.bin"
    )
    loaded = load_model(output, torch.float32)
    assert torch.equal(loaded.model.projector.query, tensors["model.mm_projector.query"])
    assert loaded.config.resampler_roi_aligned is False
    processor = load_processor(output)
    assert (processor.newline_token_id, processor.comma_token_id) == (13, 29892)

    tensors.pop("model.mm_projector.proj")
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="proj"):
        assemble(
            WEIGHTS / "clip",
            WEIGHTS / "qwen2",
            tmp_path / "again",
            resampler_grid=3,
            projector=tmp_path / "mm_projector.bin",
        )
    assert not (tmp_path / "again").exists()


def test_low_resolution_model_has_a_token_per_patch(tmp_path):
    from PIL import Image

    output = assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", tmp_path / "low", projector_type="mlp2x_gelu")
    model, processor = load_model(output, torch.float32).eval(), load_processor(output)
    inputs = processor(images=[Image.new("RGB", (90, 70))], text=["<image>"])
    assert inputs["input_ids"].shape == (1, 36)
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == 36


def test_wrong_folders_are_named(tmp_path, checkpoint):
    with pytest.raises(UserError, match="--vision"):
        assemble(tmp_path / "nothing", WEIGHTS / "qwen2", tmp_path / "out")
    with pytest.raises(UserError, match="exists already and was assembled with another resampler_grid"):
        assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", checkpoint)
    assert assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", checkpoint, resampler_grid=3) == checkpoint
    with pytest.raises(UserError, match="cannot be loaded as AutoModelForCausalLM"):
        assemble(WEIGHTS / "clip", WEIGHTS / "clip", tmp_path / "out")
    with pytest.raises(UserError, match="'qwen2' model"):
        check_checkpoint(WEIGHTS / "qwen2")
    with pytest.raises(UserError, match=r"no config\.json"):
        check_checkpoint(tmp_path)
    with pytest.raises(UserError, match="name one of them"):
        check_checkpoint(WEIGHTS)


def test_a_truncated_checkpoint_is_refused(tmp_path, checkpoint):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.projector.query")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys, first 'model\.projector\.query'"):
        load_model(broken, torch.float32)


def test_a_llama_3_language_model(llama, tmp_path):
    output = assemble(WEIGHTS / "clip", llama, tmp_path / "out", resampler_grid=3)
    model, processor = load_model(output, torch.float32), load_processor(output)
    image = Image.effect_noise((90, 90), 50).convert("RGB")
    batch = processor(images=image, text=processor.prompt([{"role": "user", "content": "<image>\nWhat is it?"}]))
    assert processor.image_token_id == model.config.text_config.vocab_size  # outside the vocabulary, never embedded
    assert torch.isfinite(model(**batch).logits).all()
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.config.text_config.rope_parameters["rope_type"] == "llama3"


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = load_processor(tmp_path).tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer has \d+ tokens, the language model 1024 rows"):
        load_processor(tmp_path)
