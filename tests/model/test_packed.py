"""A packed row gives the loss and the gradients of its samples one by one, and no sample sees its neighbour."""

import pytest
import torch
from torch.nn import functional as F

from llava.data.collator import Collator
from llava.data.dataset import ConversationDataset
from llava.model import head as head_module
from llava.model import packed_attention  # noqa: F401  (registers it)


@pytest.fixture
def samples(processor, world):
    dataset = ConversationDataset([str(world / "instructions.json"), str(world / "text_only.jsonl")], processor)
    return [dataset[index] for index in (0, 1, len(dataset) - 1, 2)]


def loss_and_gradients(model, batch, implementation, tokens):
    model.model.language_model.config._attn_implementation = implementation
    model.zero_grad()
    batch = {key: value for key, value in batch.items() if key != "ids"}
    loss = model(**batch, num_items_in_batch=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_equals_padded_in_loss_and_gradients(model, processor, samples):
    packed, padded = (Collator(processor.tokenizer.pad_token_id, packing)(samples) for packing in (True, False))
    tokens = int((packed["labels"] != -100).sum())
    assert tokens == int((padded["labels"][:, 1:] != -100).sum())
    one, first = loss_and_gradients(model, packed, "packed_sdpa", tokens)
    two, second = loss_and_gradients(model, padded, "sdpa", tokens)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sample_does_not_see_its_neighbours(model, processor, samples):
    model.model.language_model.config._attn_implementation = "packed_sdpa"
    collate = Collator(processor.tokenizer.pad_token_id)
    with torch.no_grad():
        batch = {key: value for key, value in collate(samples).items() if key not in ("ids", "labels")}
        together = model(**batch).logits[0]
        start = 0
        for sample in samples:
            alone = {key: value for key, value in collate([sample]).items() if key not in ("ids", "labels")}
            stop = start + len(sample["input_ids"])
            torch.testing.assert_close(together[start:stop], model(**alone).logits[0], atol=1e-4, rtol=1e-4)
            start = stop


def test_an_unpacked_batch_is_refused_by_packed_attention(model, processor, samples):
    model.model.language_model.config._attn_implementation = "packed_sdpa"
    padded = Collator(processor.tokenizer.pad_token_id, packing=False)(samples)
    with pytest.raises(ValueError, match="packed_sdpa wants a packed batch"):
        model(**{key: value for key, value in padded.items() if key != "ids"})


def test_chunked_loss_equals_the_plain_one_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK", 7)
    torch.manual_seed(0)
    head = head_module.LanguageModelHead(16, 50, bias=False)
    hidden, targets = torch.randn(40, 16, requires_grad=True), torch.randint(0, 50, (40,))
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    chunked = head(hidden, targets)
    torch.testing.assert_close(chunked, plain)
    for ours, theirs in zip(torch.autograd.grad(chunked, [hidden, head.weight]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
