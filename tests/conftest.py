"""Shared fixtures: a checkpoint assembled from the embedded weights, and a small toy world. Built once per worker."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "llava" / "toy" / "weights"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A complete checkpoint folder: embedded CLIP tower and Qwen2, fresh projector."""
    from llava.model.assemble import assemble

    output = tmp_path_factory.mktemp("checkpoint") / "init"
    return assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", output, resampler_grid=3)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A language-model folder of the Llama 3 kind: untied head, Llama 3's turn tokens, a full vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("llama") / "llama"
    corpus = ["system user assistant You are a helpful assistant. What is in the photo? a red circle"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, 300)
    turn = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turn})
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end_of_text|>"), rope_parameters={"rope_type": "llama3",
        "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256},
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def low_resolution(tmp_path_factory) -> Path:
    """A checkpoint of the low-resolution model: `mlp2x_gelu`, one square, one token a patch."""
    from llava.model.assemble import assemble

    output = tmp_path_factory.mktemp("low_resolution") / "init"
    return assemble(WEIGHTS / "clip", WEIGHTS / "qwen2", output, projector_type="mlp2x_gelu")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A toy world with a handful of scenes per split."""
    from llava.toy.world import build

    return build(tmp_path_factory.mktemp("world"), scale=0.03, questions=4)


@pytest.fixture
def processor(checkpoint):
    from llava.model.load import load_processor

    return load_processor(checkpoint)


@pytest.fixture
def model(checkpoint):
    import torch

    from llava.model.load import load_model

    return load_model(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photos and captions, named by SICOG_DATA or beside the checkout; tests skip without it."""
    folder = Path(os.environ.get("SICOG_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SICOG_DATA")
    return folder
