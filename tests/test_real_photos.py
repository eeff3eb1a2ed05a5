"""Real photos through the same stages: with the toy model, and with Qwen2's real vocabulary at CLIP's real resolution.

Nothing may assume toy sizes. The second model is random, so its texts mean nothing; every path it takes is real.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from llava.model.assemble import assemble
from llava.records import read_jsonl, write_records

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def real_vocabulary_checkpoint(real_data, tmp_path_factory):
    """CLIP at 336 px and patch 14, 12x12 resampler, Qwen2's tokenizer and padded vocabulary; narrow and random."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(real_data / "qwen2-tokenizer")
    tokenizer.save_pretrained(folder / "lm")
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=152_064, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "lm")  # fmt: skip
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        )
    ).save_pretrained(folder / "clip")
    return assemble(folder / "clip", folder / "lm", folder / "init")


@pytest.fixture(scope="module")
def photos(real_data, tmp_path_factory):
    """Twelve captioned photos as training records, and as unlabelled ones."""
    folder = tmp_path_factory.mktemp("photos")
    rows = list(read_jsonl(real_data / "coco_captions" / "captions.jsonl"))[:12]
    question = {"from": "human", "value": "<image>\nPlease describe the image in detail."}
    records = [{"id": str(row["id"]), "image": row["image"], "conversations": [question]} for row in rows]
    answers = [{"from": "gpt", "value": " ".join(caption.strip() for caption in row["captions"])} for row in rows]
    write_records(folder / "unlabelled.jsonl", records)
    labelled = [{**r, "conversations": [question, answer]} for r, answer in zip(records, answers, strict=True)]
    write_records(folder / "captioned.jsonl", labelled)
    return folder


def script(path, *flags, **variables):
    python = ROOT / ".venv" / "bin" / "python"
    environment = {**os.environ, "PYTHON": str(python) if python.exists() else "python3"}
    environment |= {key: str(value) for key, value in variables.items()}
    result = subprocess.run(
        ["bash", str(ROOT / path), *flags], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("name", ["toy", "real vocabulary"])
def test_recaption_curate_and_train(name, request, real_data, photos, tmp_path):
    fixture = "checkpoint" if name == "toy" else "real_vocabulary_checkpoint"
    model = request.getfixturevalue(fixture)
    images = real_data / "coco_captions"
    common = {"IMAGE_FOLDER": images, "MODEL_PATH": model, "MAX_NEW_TOKENS": 8, "BATCH_SIZE": 4, "TEMPERATURE": 1}
    files = []
    for style in ("cod-default", "default"):
        script("recap_scripts/recap_inference.sh", DATA_PATH=photos / "unlabelled.jsonl", PROMPT=style, N_CANDIDATES=2,
               OUTPUT_DIR=tmp_path / style, **common)  # fmt: skip
        files.append(str(tmp_path / style / "candidates.jsonl"))
        assert len(list(read_jsonl(files[-1]))) == 12
    out = script(
        "quality_evaluation/scripts/recaption_quality_eval.sh",
        "--allow_cut_off",
        RAW_DATASET=",".join(files),
        THRESHOLD="-1",
        OUTPUT_DIR=tmp_path / "curated",
    )
    assert "12 in, 12 kept" in out
    chosen = list(read_jsonl(tmp_path / "curated" / "chosen.jsonl"))
    usable = [record for record in chosen if record["conversations"][1]["value"].strip()]
    assert len(usable) == 12
    out = script(
        "training_scripts/uhdv1-finetune-qwen-stage2-sft.sh", "--max_steps", "2", "--image_folder", str(images),
        EXPERIMENT_NAME="photos", OUTPUT_DIR=tmp_path / "trained", PREV_STAGE_CHECKPOINT=model, ACCU_STEPS=1, FINETUNE_BATCH=2,
        DATA_PATH=f"{tmp_path / 'curated' / 'chosen.jsonl'},{photos / 'captioned.jsonl'}", GRADIENT_CHECKPOINTING="True",
    )  # fmt: skip
    assert "24 samples, 2 steps" in out
    losses = [row["loss"] for row in read_jsonl(tmp_path / "trained" / "log.jsonl") if "loss" in row]
    assert all(0 < loss < 20 for loss in losses)


def test_a_folder_of_photos_becomes_records(real_data, checkpoint, tmp_path):
    python = ROOT / ".venv" / "bin" / "python"
    command = [
        str(python) if python.exists() else "python3",
        "-m",
        "llava.records",
        "--from_folder",
        str(real_data / "photos"),
        "--output",
    ]
    subprocess.run([*command, str(tmp_path / "photos.jsonl")], check=True, cwd=ROOT, capture_output=True)
    records = list(read_jsonl(tmp_path / "photos.jsonl"))
    assert len(records) > 60
    script("recap_scripts/recap_inference.sh", MODEL_PATH=checkpoint, DATA_PATH=tmp_path / "photos.jsonl", IMAGE_FOLDER=real_data / "photos",
           MAX_NEW_TOKENS=2, BATCH_SIZE=16, OUTPUT_DIR=tmp_path / "out")  # fmt: skip
    done = {row["id"] for row in read_jsonl(tmp_path / "out" / "candidates.jsonl")}
    rejected = list(read_jsonl(tmp_path / "out" / "candidates.rejected.jsonl"))
    assert done | {row["id"] for row in rejected} == {record["id"] for record in records}
    assert "skimage/truncated.jpg" in {row["id"] for row in rejected}  # it is, in fact, truncated
    assert all(row["reason"] for row in rejected)
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert state["counts"]["in"] == len(records)
