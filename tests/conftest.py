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
