"""Processor: text with `<image>` and images -> token ids with placeholders laid out, and packed patches.

The layout of one image in the sequence is decided here and nowhere else. Each feature is one placeholder id; the
separators are ordinary tokens of the vocabulary. The image processor's `slice_layout` says which:

    stitched   (SICOG) the slices' features as one row-major map, a newline after every feature row, one comma, the
               overview
    per_slice  (LLaVA-UHD v1) slice after slice, each followed by a comma or, at the end of its row, a newline; the
               overview
"""

import base64
import io
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessorMixin

from llava.images import load_image, to_rgb
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor

IMAGE_TOKEN = "<image>"
LABEL_POLICIES = ("assistant", "legacy_qwen")


class LlavaUHDProcessor(ProcessorMixin):
    """Tokenizer and image processor as one.

    Args:
        resampler_grid: queries along one side of the projector's output for a slice; None when the projector keeps
            one token a patch (`mlp2x_gelu`).
        newline_token_id, comma_token_id: row and slice/overview separators; from the tokenizer when absent.
            Published checkpoints need 13 and 29892 here, whatever their tokenizer says.
        single_column_comma: False for published `stitched` checkpoints, which saw a newline where the comma belongs
            when the grid had one column.
        label_policy: `assistant` labels what the assistant says and its end token. `legacy_qwen` labels as published
            checkpoints were trained: the assistant's header too, and every newline and turn token of all turns.
    """

    def __init__(
        self,
        image_processor: LlavaUHDImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        resampler_grid: int | None = 12,
        newline_token_id: int | None = None,
        comma_token_id: int | None = None,
        single_column_comma: bool = True,
        label_policy: str = "assistant",
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if label_policy not in LABEL_POLICIES:
            raise ValueError(f"label_policy is {label_policy!r}; choose one of {', '.join(LABEL_POLICIES)}")
        self.single_column_comma, self.label_policy = single_column_comma, label_policy
        self.resampler_grid = resampler_grid
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no {IMAGE_TOKEN} token; build the checkpoint with llava.model.assemble"
            )
        self.newline_token_id = single_token(tokenizer, "\n") if newline_token_id is None else newline_token_id
        self.comma_token_id = single_token(tokenizer, ",") if comma_token_id is None else comma_token_id

    def image_ids(self, width: int, height: int, image_mode: str | None = None) -> list[int]:
        """Token ids that stand for one image of this size."""
        (rows, columns), shapes = self.image_processor.layout(width, height, image_mode)
        ids: list[int] = []
        if rows:
            h, w = self.token_grid(shapes[0])
            if self.image_processor.slice_layout == "per_slice":
                piece = [self.image_token_id] * (h * w)
                ids += ([*piece, self.comma_token_id] * (columns - 1) + [*piece, self.newline_token_id]) * rows
            else:
                row = [self.image_token_id] * (columns * w) + [self.newline_token_id]
                comma = columns > 1 or self.single_column_comma
                ids += row * (rows * h) + [self.comma_token_id if comma else self.newline_token_id]
        h, w = self.token_grid(shapes[-1])
        return ids + [self.image_token_id] * (h * w)

    def token_grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape if self.resampler_grid is None else (self.resampler_grid, self.resampler_grid)

    def expand(self, ids: list[int], image_ids: list[list[int]]) -> list[int]:
        """Replace the k-th image token of `ids` by `image_ids[k]`. Raises ValueError when the counts differ."""
        found = ids.count(self.image_token_id)
        if found != len(image_ids):
            raise ValueError(f"the text has {found} {IMAGE_TOKEN} but {len(image_ids)} images were given")
        expanded: list[int] = []
        images = iter(image_ids)
        for token in ids:
            if token == self.image_token_id:
                expanded += next(images)
            else:
                expanded.append(token)
        return expanded

    def encode_conversation(
        self,
        messages: list[dict[str, str]],
        image_sizes: list[tuple[int, int]],
        image_mode: str | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole conversation, image tokens expanded.

        Labels are -100 except where `label_policy` says. `messages` are role/content dicts.
        """
        encoded = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, return_dict=True, return_assistant_tokens_mask=True
        )
        images = [self.image_ids(width, height, image_mode) for width, height in image_sizes]
        ids = self.expand(encoded["input_ids"], images)
        labels: list[int] = []
        remaining = iter(images)
        learned = encoded["assistant_masks"]
        if self.label_policy == "legacy_qwen":
            learned = self.legacy_mask(encoded["input_ids"], learned)
        for token, spoken in zip(encoded["input_ids"], learned, strict=True):
            if token == self.image_token_id:
                labels += [-100] * len(next(remaining))
            else:
                labels.append(token if spoken else -100)
        return ids, labels

    def legacy_mask(self, ids: list[int], spoken: list[int]) -> list[bool]:
        """The labels of published ChatML checkpoints: `<|im_start|>assistant\\n`, answer, `<|im_end|>\\n`, and every
        newline and turn token anywhere.
        """
        opens, ends = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        everywhere = {opens, ends, single_token(self.tokenizer, "\n")}
        header = len(self.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False))
        mask = [bool(flag) or token in everywhere for token, flag in zip(ids, spoken, strict=True)]
        for index in range(header, len(ids)):
            if spoken[index] and not spoken[index - 1]:
                mask[index - header : index] = [True] * header
        return mask

    def __call__(
        self,
        images: Image.Image | str | list | None = None,
        text: str | list[str] | None = None,
        image_mode: str | None = None,
        padding_side: str = "left",
        return_mm_token_type_ids: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """Prompts (chat template already applied) and their images, in order, for generation.

        An image is a PIL image, a file's path, or a `data:` URL as chat-completions servers receive it.

        Returns:
            input_ids and attention_mask (B, T), padded on `padding_side`, plus the image processor's output. With
            `return_mm_token_type_ids` also mm_token_type_ids (B, T): 1 where a token, separators included, belongs
            to an image.

        Raises:
            ValueError: the text has more or fewer `<image>` than there are images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [open_image(image) for image in flatten(images)]
        queue = iter(pictures)
        rows, types = [], []
        for prompt in texts:
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            wanted = ids.count(self.image_token_id)
            own = [self.image_ids(*image.size, image_mode) for image in islice(queue, wanted)]
            rows.append(self.expand(ids, own))
            kinds = self.expand([token if token == self.image_token_id else -1 for token in ids], own)
            types.append([int(kind != -1) for kind in kinds])
        if (left := len(list(queue))) > 0:
            raise ValueError(f"{left} more images than {IMAGE_TOKEN} in the text")
        batch = pad(rows, self.tokenizer.pad_token_id, padding_side)
        if return_mm_token_type_ids:
            batch["mm_token_type_ids"] = pad(types, 0, padding_side)["input_ids"]
        if pictures:
            batch.update(self.image_processor(pictures, image_mode=image_mode))
        return BatchFeature(batch)

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation with an open assistant turn."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Tokens (separators included) and patches of images of these (height, width): what servers ask beforehand."""
        tokens, patches = [], []
        for height, width in image_sizes or []:
            tokens.append(len(self.image_ids(width, height)))
            patches.append(sum(rows * columns for rows, columns in self.image_processor.layout(width, height)[1]))
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens in this vocabulary; give the separator ids explicitly")
    return ids[0]


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """A PIL image, a file's path or a `data:` URL as upright RGB.

    Raises:
        ImageError: the file or the bytes are no image.
        ValueError: an address on the network; nothing is downloaded here.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Path) or not image.startswith(("data:", "http://", "https://")):
        return load_image(image)
    if not image.startswith("data:"):
        raise ValueError(f"image {image[:80]!r} is on the network; download it, or send it as a data: URL")
    return load_image(io.BytesIO(base64.b64decode(image.partition(",")[2])))


def flatten(images: Image.Image | list | None) -> list[Image.Image]:
    """One image, a list, or a list of lists (one per prompt) as a flat list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in flatten(item)]


def pad(rows: list[list[int]], pad_token_id: int, side: str) -> dict[str, torch.Tensor]:
    """Ragged ids as input_ids and attention_mask (B, T)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


AutoProcessor.register(LlavaUHDConfig, LlavaUHDProcessor)
