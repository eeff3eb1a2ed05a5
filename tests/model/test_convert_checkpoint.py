"""Synthetic checkpoints with exactly the published key names, in every container they were published in."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.errors import UserError
from llava.model.assemble import assemble
from llava.model.convert_checkpoint import convert
from llava.model.load import load_model, load_processor

WEIGHTS = Path(__file__).parents[2] / "llava" / "toy" / "weights"


def published_name(name: str) -> str:
    for ours, theirs in (
        ("model.projector.", "model.mm_projector."),
        ("model.vision_tower.clip.", "model.vision_tower.vision_tower.vision_model."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model whose RoIAlign and feature layer are the published ones, as the source of every synthetic checkpoint."""
    folder = assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", tmp_path_factory.mktemp("original") / "a", seed=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "resampler_roi_aligned": False}))
    return load_model(folder, torch.float32)


@pytest.fixture
def publish(original, tmp_path):
    """Write `original` in the published layout; `change` may edit the tensors, `config` the config."""

    def write(container="safetensors", tower=True, change=None, config=None, shards=1) -> Path:
        folder = tmp_path / "published"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(WEIGHTS / "qwen2", folder, ignore=shutil.ignore_patterns("model.safetensors"))
        text = original.config.text_config.to_dict()
        rope = text.pop("rope_parameters")
        stated = {
            **text, "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "rope_theta": rope["rope_theta"],
            "mm_projector_type": "adapt_spatial_resampler_v1", "mm_vision_select_layer": -2, "mm_hidden_size": 96,
            "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "image_aspect_ratio": "square",
            "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "use_mm_proj": True,
            "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096, "mm_vision_tower": "/somewhere/clip",
            **(config or {}),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(stated))
        tensors = {published_name(name): tensor.clone() for name, tensor in original.state_dict().items()}
        tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
        if not tower:
            tensors = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
        if change:
            change(tensors)
        names = sorted(tensors)
        stem, suffix = ("model", "safetensors") if container == "safetensors" else ("pytorch_model", "bin")
        weight_map = {}
        for shard in range(shards):
            part = {name: tensors[name] for name in names[shard::shards]}
            file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
            save_file(part, folder / file) if container == "safetensors" else torch.save(part, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        if shards > 1:
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


def convert_here(source, tmp_path, **options):
    return convert(source, tmp_path / "converted", WEIGHTS / "clip", **options)


@pytest.mark.parametrize(("container", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_every_tensor_arrives(publish, original, tmp_path, container, shards, capsys):
    folder = convert_here(publish(container, shards=shards), tmp_path)
    converted = load_model(folder, torch.float32)
    assert converted.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    tensors = len(original.state_dict())
    assert re.search(rf"matched +{tensors} tensors .*, 0 of .*; 1 recomputed", capsys.readouterr().out)


def test_what_the_weights_were_trained_with_is_kept(publish, tmp_path):
    folder = convert_here(publish(config={"rope_theta": 1e6}), tmp_path)
    processor, model = load_processor(folder), load_model(folder, torch.float32)
    assert (processor.newline_token_id, processor.comma_token_id) == (13, 29892)
    assert (processor.label_policy, processor.image_processor.slice_layout) == ("legacy_qwen", "stitched")
    assert not processor.single_column_comma
    assert processor.image_processor.long_side == 1024
    assert not model.config.resampler_roi_aligned
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6


def test_the_tower_comes_from_the_clip_folder_when_the_checkpoint_has_none(publish, original, tmp_path):
    folder = convert_here(publish(tower=False), tmp_path)
    tower = load_model(folder, torch.float32).model.vision_tower.clip.state_dict()
    for name, tensor in original.model.vision_tower.clip.state_dict().items():
        assert torch.equal(tower[name], tensor), name


def test_low_resolution_checkpoint(publish, original, tmp_path):
    first, second = torch.randn(128, 96), torch.randn(128, 128)

    def mlp(tensors):
        for name in [name for name in tensors if "mm_projector" in name]:
            del tensors[name]
        tensors.update({"model.mm_projector.0.weight": first, "model.mm_projector.0.bias": torch.zeros(128)})
        tensors.update({"model.mm_projector.2.weight": second, "model.mm_projector.2.bias": torch.zeros(128)})

    folder = convert_here(publish(change=mlp, config={"mm_projector_type": "mlp2x_gelu"}), tmp_path)
    processor = load_processor(folder)
    assert torch.equal(load_model(folder, torch.float32).model.projector[2].weight, second)
    assert (processor.image_processor.image_mode, processor.image_processor.long_side) == ("square", None)
    assert len(processor.image_ids(500, 400)) == 36


def test_called_again_it_does_nothing_and_never_overwrites(publish, tmp_path):
    source = publish()
    folder = convert_here(source, tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert_here(source, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another slice_layout"):
        convert_here(source, tmp_path, slice_layout="per_slice")


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.mm_projector.query"), r"1 tensors are missing, first 'model.projector.query'"),
        (drop("model.layers.0.mlp.up_proj.weight"), "1 tensors are missing"),
        (put("model.image_newline", torch.zeros(128)), "no place in this model, first 'model.image_newline'"),
        (put("model.mm_projector.query", torch.zeros(64, 128)), r"projector.query has shape \(64, 128\).*\(144, 128\)"),
        (put("model.norm.weight", torch.full((128,), torch.nan)), "not finite"),
        (put("model.norm.weight", torch.ones(128, dtype=torch.int8)), "int8; quantised"),
        (put("model.embed_tokens.weight", torch.zeros(1000, 128)), r"embed_tokens.weight has shape \(1000, 128\)"),
    ],
)
def test_any_surprise_is_refused_and_nothing_written(publish, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        convert_here(publish(change=change), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_projector_type": "pooler"}, "mm_projector_type is 'pooler'"),
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    ],
)
def test_unknown_settings_are_named(publish, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        convert_here(publish(config=config), tmp_path)


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_a_truncated_file_is_named(publish, tmp_path, container):
    source = publish(container)
    file = next(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{file.name} cannot be read.*download the file again"):
        convert_here(source, tmp_path)


def test_a_shard_that_is_missing_is_named(publish, tmp_path):
    source = publish(shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors, which is not there"):
        convert_here(source, tmp_path)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("payload-ran"),)


def test_code_in_a_bin_file_is_never_run(publish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = publish("bin")
    torch.save({"model.norm.weight": Payload()}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        convert_here(source, tmp_path)
    assert not (tmp_path / "payload-ran").exists()


def test_a_projector_file_wants_its_language_model(original, tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save(
        {f"model.mm_projector.{name}": tensor for name, tensor in original.model.projector.state_dict().items()}, file
    )
    with pytest.raises(UserError, match="--language"):
        convert_here(file, tmp_path)
    folder = convert_here(file, tmp_path, language=WEIGHTS / "qwen2")
    assert torch.equal(load_model(folder, torch.float32).model.projector.query, original.model.projector.query)
    assert load_processor(folder).newline_token_id == 13
