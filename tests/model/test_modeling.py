import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def prompts(processor):
    images = [noise(100, 84, 0), noise(40, 40, 1), noise(150, 50, 2)]
    questions = ["What color is the circle?", "How many?", "Where is the red square in this image?"]
    texts = [processor.prompt([{"role": "user", "content": f"<image>\n{question}"}]) for question in questions]
    return images, texts


def test_stitching_puts_slice_tokens_in_row_major_image_order(model):
    # a 2x2 grid of slices of 2x2 tokens whose value is their own number in the stitched map
    whole = torch.arange(16.0).view(4, 4)
    slices = [whole[r : r + 2, c : c + 2].reshape(4, 1) for r in (0, 2) for c in (0, 2)]
    model.model.projector.grid = 2
    assert model.model.stitch(slices, 2, 2, (6, 6)).flatten().tolist() == list(range(16))


def test_batch_equals_single_and_padding_does_not_leak(model, processor, prompts):
    images, texts = prompts
    with torch.no_grad():
        batch = processor(images=images, text=texts)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**batch, position_ids=positions).logits
        for index, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = model(**processor(images=[image], text=[text])).logits[0]
            torch.testing.assert_close(together[index, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_generate_on_a_batch_equals_one_at_a_time(model, processor, prompts):
    images, texts = prompts
    settings = {"max_new_tokens": 12, "do_sample": False}
    batch = processor(images=images, text=texts)
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    queue = iter(images)
    for text, row in zip(texts, together, strict=True):
        own = [next(queue) for _ in range(text.count("<image>"))]
        single = processor(images=own or None, text=text)
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :].tolist()
        assert row.tolist()[: len(alone)] == alone


def test_generate_equals_stepwise_argmax(model, processor, prompts):
    images, texts = prompts
    inputs = processor(images=images[:1], text=texts[:1])
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)[
        0, inputs["input_ids"].shape[1] :
    ]
    ids = inputs["input_ids"]
    for token in generated:
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            assert model(input_ids=ids, **rest).logits[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def test_loss_is_the_mean_over_labelled_tokens(model, processor, prompts):
    images, texts = prompts
    batch = processor(images=images, text=texts, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :20] = -100
    labels[labels == processor.image_token_id] = -100
    with torch.no_grad():
        logits = model(**batch).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
        tokens = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=2 * tokens).loss, expected / 2)


def test_feature_count_mismatch_raises(model, processor, prompts):
    images, texts = prompts
    inputs = processor(images=images[:1], text=texts[:1])
    inputs["input_ids"][inputs["input_ids"] == processor.image_token_id] = 5
    with pytest.raises(ValueError, match="0 image placeholders in input_ids, but 45 image features"):
        model(**inputs)


def test_placeholders_without_pixels_raise(model, processor):
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=torch.tensor([[processor.image_token_id]]))


def test_text_only_batch_still_reaches_every_trained_part(model, processor):
    from llava.train.parts import set_trainable

    set_trainable(model, ["vision", "projector", "language"])
    model.train()
    ids = torch.tensor([processor.tokenizer("What is 2 plus 3?")["input_ids"]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    vision = [p for p in model.model.vision_tower.parameters() if p.requires_grad]
    assert all(not p.grad.any() for p in vision)  # present, and zero
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss.detach())


def test_a_second_process_loads_what_the_first_saved(model, processor, prompts, tmp_path):
    images, texts = prompts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images[0].save(tmp_path / "image.png")
    with torch.no_grad():
        expected = model(**processor(images=images[:1], text=texts[:1])).logits
    torch.save(expected, tmp_path / "logits.pt")
    program = f"""
import torch
from PIL import Image
from llava.model.load import load_model, load_processor
folder = {str(tmp_path)!r}
model, processor = load_model(folder, dtype=torch.float32).eval(), load_processor(folder)
inputs = processor(images=[Image.open(folder + "/image.png")], text=[{texts[0]!r}])
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(folder + "/logits.pt", weights_only=True))
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]
