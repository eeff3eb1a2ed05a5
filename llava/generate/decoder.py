"""One batch of candidates that is refilled while it is decoded.

A prompt's images are encoded once, and what its messages have in common is prefilled once, into a place of its own. What
each message adds is run once more; every candidate then starts from there in a row of its own. A row that ends makes
room for the next candidate.

R rows; V vocabulary; heads as in `prefix_attention.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.generate.candidates import (
    Completion,
    Draw,
    Finished,
    Key,
    More,
    Prompt,
    Sampling,
    completion_of,
    end_tokens,
)
from llava.generate.choose import choose, uniform_stream
from llava.generate.prefix_attention import SHARED_PREFIX, Rows, Store
from llava.model.packed_attention import PACKED_SDPA


@dataclass
class Group:
    """A prompt in flight: its place among the prefixes, what its messages add to that, and its draws so far."""

    key: Key
    place: int
    prefix_length: int
    texts: list["MessageState"]
    waiting: list[tuple[int, Draw]]
    finished: dict[int, tuple[Draw, Completion]] = field(default_factory=dict)
    drawn: int = 0


@dataclass
class MessageState:
    """A message after its prefix: keys and values (layers, K, tokens, D), logits (V,) of the first answer token."""

    keys: Tensor
    values: Tensor
    logits: Tensor


@dataclass
class Row:
    """A candidate being decoded."""

    group: Group
    number: int
    draw: Draw
    ids: list[int]
    uniforms: list[float]  # max_new_tokens numbers in [0, 1)
    length: int  # tokens it holds in its own store


class Decoder:
    """The refilled batch. Row r of `self.rows` holds slot r of the own store; a prompt holds a place of the prefixes."""

    def __init__(self, model, processor, sampling: Sampling, rows: int, more: More | None):
        self.model, self.processor, self.sampling, self.most, self.more = model, processor, sampling, rows, more
        self.config = model.model.language_model.config
        self.device = model.device
        self.groups: list[Group] = []
        self.rows: list[Row] = []
        self.layout: Rows | None = None  # None: rows or places changed
        self.prefixes = self.own = None
        self.prefix_lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.ends = set(end_tokens(processor))
        vocabulary = self.config.vocab_size
        self.impossible = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.impossible[len(processor.tokenizer) :] = True  # rows of the vocabulary that stand for no token
        self.impossible[processor.image_token_id : processor.image_token_id + 1] = True

    def free(self) -> int:
        """Rows for further prompts; none while draws wait or less than a quarter of the rows is free."""
        free = self.most - len(self.rows)
        return 0 if free * 4 < self.most or any(group.waiting for group in self.groups) else free

    def admit(self, prompts: list[tuple[Key, Prompt]]) -> None:
        """Encode the images, prefill what each prompt's messages share, then the rest of each message."""
        if not prompts:
            return
        encoded = [self.token_ids(prompt) for _, prompt in prompts]
        shared = [common_length(messages) for messages in encoded]
        prefixes = [messages[0][:length] for messages, length in zip(encoded, shared, strict=True)]
        cache = self.prefill([prompt for _, prompt in prompts], prefixes)
        keys, values = (
            torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values")
        )  # (layers, K, all tokens, D)
        if self.prefixes is None:
            self.prefixes = Store(keys[:1], len(keys), 0)
            self.own = Store(keys[:1], len(keys), self.most)
        start, groups = 0, []
        for (key, prompt), length in zip(prompts, shared, strict=True):
            place = self.free_place()
            self.prefixes.put(place, keys[:, :, start : start + length], values[:, :, start : start + length])
            self.prefix_lengths[place] = length
            start += length
            group = Group(key, place, length, [], list(enumerate(prompt.draws)), drawn=len(prompt.draws))
            self.groups.append(group)
            groups.append(group)
        self.read_messages(
            groups, [[ids[length:] for ids in messages] for messages, length in zip(encoded, shared, strict=True)]
        )

    def token_ids(self, prompt: Prompt) -> list[list[int]]:
        """Token ids of every message, image tokens laid out."""
        images = [self.processor.image_ids(*image.size) for image in prompt.images]
        texts = [self.processor.prompt([{"role": "user", "content": message}]) for message in prompt.messages]
        tokenized = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self.processor.expand(ids, images) for ids in tokenized]

    def free_place(self) -> int:
        """The lowest place that no prompt holds; a new one when all are held."""
        taken = {group.place for group in self.groups}
        place = next(number for number in range(len(taken) + 1) if number not in taken)
        if place == len(self.prefix_lengths):
            self.prefixes.reserve(slots=place + 1)
            self.prefix_lengths = torch.cat([self.prefix_lengths, self.prefix_lengths.new_zeros(1)])
        return place

    def prefill(self, prompts: list[Prompt], prefixes: list[list[int]]) -> DynamicCache:
        """Keys and values of all prefixes, side by side in one row, each attending to itself."""
        lengths = [len(ids) for ids in prefixes]
        inputs = {
            "input_ids": torch.tensor([[token for ids in prefixes for token in ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        }
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            inputs.update(self.processor.image_processor(images))
        cache = DynamicCache()
        with self.attention(PACKED_SDPA):
            self.model.model(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()},
                past_key_values=cache,
                use_cache=True,
            )
        return cache

    def read_messages(self, groups: list[Group], messages: list[list[list[int]]]) -> None:
        """Run what follows the prefix in every message, padded on the right, and keep its state in the groups."""
        pairs = [(group, ids) for group, own in zip(groups, messages, strict=True) for ids in own]
        longest = max(len(ids) for _, ids in pairs)
        places = torch.tensor([group.place for group, _ in pairs], device=self.device)
        zeros = torch.zeros_like(places)
        store = Store(self.own.keys[0], len(self.own.keys), len(pairs))
        store.reserve(length=longest)
        rows = Rows(self.prefixes, store, places, self.prefix_lengths, zeros)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in pairs], device=self.device)
        positions = self.prefix_lengths[places][:, None] + torch.arange(longest, device=self.device)
        with self.attention(SHARED_PREFIX):
            hidden = self.model.model(
                input_ids=ids, position_ids=positions, use_cache=False, rows=rows
            ).last_hidden_state
        last = torch.tensor([len(ids) - 1 for _, ids in pairs], device=self.device)
        logits = self.model.lm_head(hidden[rows.row, last])
        for number, (group, own) in enumerate(pairs):
            keys, values = (part[:, number, :, : len(own)].clone() for part in (store.keys, store.values))
            group.texts.append(MessageState(keys, values, logits[number].clone()))

    def step(self) -> Iterator[tuple[Key, Finished]]:
        """Start waiting draws where rows are free, decode one token for all, yield the prompts that are finished."""
        started = self.start_rows()
        if started:
            logits = torch.stack([row.group.texts[row.draw.message].logits for row in started])
            self.take(started, logits)
            yield from self.leave()
        if not self.rows:
            return
        if self.layout is None:
            places = torch.tensor([row.group.place for row in self.rows], device=self.device)
            lengths = torch.tensor([row.length for row in self.rows], device=self.device)
            self.layout = Rows(self.prefixes, self.own, places, self.prefix_lengths, lengths)
        self.own.reserve(length=self.layout.longest_own + 1)
        positions = self.prefix_lengths[self.layout.places] + self.layout.lengths
        ids = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.device)
        with self.attention(SHARED_PREFIX):
            logits = self.model(
                input_ids=ids, position_ids=positions[:, None], use_cache=False, rows=self.layout
            ).logits[:, -1]
        self.layout.advance()
        for row in self.rows:
            row.length += 1
        self.take(self.rows, logits)
        yield from self.leave()

    def start_rows(self) -> list[Row]:
        """Rows for draws that wait, the oldest prompt first."""
        started = []
        for group in self.groups:
            while group.waiting and len(self.rows) < self.most:
                number, draw = group.waiting.pop(0)
                text = group.texts[draw.message]
                uniforms = uniform_stream(draw.seed, self.sampling.max_new_tokens)
                self.own.put(len(self.rows), text.keys, text.values)
                row = Row(group, number, draw, [], uniforms, text.keys.shape[2])
                self.rows.append(row)
                started.append(row)
                self.layout = None
        return started

    def take(self, rows: list[Row], logits: Tensor) -> None:
        """Choose the next token of these rows."""
        uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in rows], device=self.device)
        tokens = choose(logits.masked_fill(self.impossible, -torch.inf), uniforms, self.sampling)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.ids.append(token)

    def leave(self) -> Iterator[tuple[Key, Finished]]:
        """Take ended rows out; the last row moves into each gap. Yield prompts whose draws are all done."""
        for slot in range(len(self.rows) - 1, -1, -1):
            row = self.rows[slot]
            stopped = row.ids[-1] in self.ends
            if not stopped and len(row.ids) < self.sampling.max_new_tokens:
                continue
            last = self.rows.pop()
            if last is not row:
                self.own.move(len(self.rows), slot, last.length)
                self.rows[slot] = last
            self.layout = None
            prompt = row.group.prefix_length + row.group.texts[row.draw.message].keys.shape[2]
            completion = completion_of(self.processor, row.ids, stopped, prompt)
            row.group.finished[row.number] = row.draw, completion
        for group in [group for group in self.groups if len(group.finished) == group.drawn]:
            finished = [group.finished[number] for number in range(group.drawn)]
            further = self.more(group.key, finished) if self.more else []
            if further:
                group.waiting = list(enumerate(further, group.drawn))
                group.drawn += len(further)
            else:
                self.groups.remove(group)
                yield group.key, finished

    @contextmanager
    def attention(self, implementation: str):
        """The language model's attention, for the block."""
        before, self.config._attn_implementation = self.config._attn_implementation, implementation
        try:
            yield
        finally:
            self.config._attn_implementation = before


def common_length(messages: list[list[int]]) -> int:
    """Tokens that all messages begin with; at least one token of each is left over."""
    shortest = min(map(len, messages)) - 1
    return next((place for place in range(shortest) if len({ids[place] for ids in messages}) > 1), shortest)
