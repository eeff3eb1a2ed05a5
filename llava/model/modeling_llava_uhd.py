"""LLaVA-UHD: CLIP over slices -> projector -> any causal language model.

The processor has already laid out the token sequence, separators included; the model encodes the slices, stitches
each image's slices into one row-major map, and scatters the features over the placeholder tokens. When the counts
differ it raises: nothing is dropped or repeated.

Shapes: B batch, T sequence, P packed patches, N slices, I images, C language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.head import LanguageModelHead
from llava.model.resampler import MlpProjector, SpatialResampler
from llava.model.vision import SliceEncoder


@dataclass
class LlavaUHDOutput(ModelOutput):
    """`logits` is None when labels were given: the loss needs logits only where there is a label.

    `token_losses`, when asked for instead of the loss: (N,) -log p of every label, row by row.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LlavaUHDPreTrainedModel(PreTrainedModel):
    config_class = LlavaUHDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SpatialResampler):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            pass  # belongs to the resampler, which initialises it as published
        else:
            super()._init_weights(module)


def projector_of(config: LlavaUHDConfig) -> SpatialResampler | MlpProjector:
    """The projector a config asks for, not yet initialised."""
    width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
    if config.projector_type == "mlp2x_gelu":
        return MlpProjector(vision_width, width)
    return SpatialResampler(
        vision_width, width, config.resampler_grid, config.resampler_heads, config.resampler_roi_aligned
    )


class LlavaUHDModel(LlavaUHDPreTrainedModel):
    """Tower, projector and language model without its head."""

    def __init__(self, config: LlavaUHDConfig):
        super().__init__(config)
        self.vision_tower = SliceEncoder(
            config.vision_config, config.vision_feature_layer, config.image_mean, config.image_std
        )
        self.projector = projector_of(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_images(self, pixel_values: Tensor, slice_shapes: Tensor, grids: Tensor) -> Tensor:
        """All image tokens of the batch in placeholder order, without separators: (image tokens, C).

        Args:
            pixel_values: (P, channels * patch**2) uint8.
            slice_shapes: (N, 2) rows and columns of patches of every slice; an image's overview comes last.
            grids: (I, 2) rows and columns of slices of every image; (0, 0) for overview only.
        """
        shapes = [tuple(shape) for shape in slice_shapes.tolist()]
        features = self.vision_tower(pixel_values, shapes)
        tokens = self.projector(features, shapes).split([self.projector.tokens(shape) for shape in shapes])
        pieces, start = [], 0
        for rows, columns in grids.tolist():
            slices = rows * columns
            if slices:
                pieces.append(self.stitch(tokens[start : start + slices], rows, columns, shapes[start]))
            pieces.append(tokens[start + slices])
            start += slices + 1
        if start != len(tokens):
            raise ValueError(f"grids describe {start} slices (overviews included), slice_shapes holds {len(tokens)}")
        return torch.cat(pieces)

    def tokens_of_images(self, slice_shapes: Tensor, grids: Tensor) -> list[int]:
        """How many image tokens each image has, separators not counted."""
        shapes = iter(slice_shapes.tolist())
        return [
            sum(self.projector.tokens(tuple(next(shapes))) for _ in range(rows * columns + 1))
            for rows, columns in grids.tolist()
        ]

    def stitch(self, slices: Sequence[Tensor], rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
        """Slices of a rows x columns grid, each (h*w, C), as one row-major map (rows*h*columns*w, C)."""
        if isinstance(self.projector, SpatialResampler):
            shape = (self.projector.grid, self.projector.grid)
        maps = torch.stack(slices).unflatten(1, shape).unflatten(0, (rows, columns))  # (rows, columns, h, w, C)
        return maps.transpose(1, 2).flatten(0, 3)

    def dummy_features(self) -> Tensor:
        """Features of one black square: keeps every rank's graph the same when a batch has no image (ZeRO, DDP)."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        patches = torch.zeros(
            side * side, vision.num_channels * vision.patch_size**2, dtype=torch.uint8, device=self.device
        )
        return self.encode_images(patches, torch.tensor([[side, side]]), torch.tensor([[0, 0]]))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        slice_shapes: Tensor | None = None,
        grids: Tensor | None = None,
        image_copies: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            placeholders = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
            if pixel_values is not None:
                features = self.encode_images(pixel_values, slice_shapes, grids).to(inputs_embeds.dtype)
                if image_copies is not None:
                    images = features.split(self.tokens_of_images(slice_shapes, grids))
                    features = torch.cat([images[number] for number in image_copies.tolist()])
                if len(features) != int(placeholders.sum()):
                    raise ValueError(
                        f"{int(placeholders.sum())} image placeholders in input_ids, but {len(features)} image features "
                        "from pixel_values; make both with the processor of this checkpoint"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), features)
            elif bool(placeholders.any()):
                raise ValueError("input_ids has image placeholders, but there are no pixel_values")
            elif self.training:
                inputs_embeds = inputs_embeds + 0.0 * self.dummy_features().sum().to(inputs_embeds.dtype)
        if cu_seq_lens is not None:  # several samples in one row, see data/collator.py
            lengths = cu_seq_lens.diff().tolist()
            kwargs.update(lengths=lengths, cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens)
            kwargs.update(max_length_q=max(lengths), max_length_k=max(lengths))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class LlavaUHDForConditionalGeneration(LlavaUHDPreTrainedModel, GenerationMixin):
    """The whole model with its LM head; trains, generates, saves and loads like any HF model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavaUHDConfig):
        super().__init__(config)
        self.model = LlavaUHDModel(config)
        self.lm_head = LanguageModelHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        slice_shapes: Tensor | None = None,
        grids: Tensor | None = None,
        labels: Tensor | None = None,
        token_losses: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> LlavaUHDOutput:
        """Next-token prediction.

        Args:
            input_ids: (B, T) with `image_token_id` where image features go.
            pixel_values, slice_shapes, grids: see `LlavaUHDModel.encode_images`; all three or none.
            labels: (B, T), -100 where nothing is learned. Only positions with a label reach the LM head.
            token_losses: give every label's own loss, not their sum.
            kwargs: `cu_seq_lens` of a packed batch (B = 1), see `data/collator.py`; `image_copies`, the images in the
                order in which they are shown, where one is shown several times; anything the language model takes.
            num_items_in_batch: labelled tokens of the whole (accumulated) batch; the loss is the sum over tokens
                divided by it, or the mean when absent.
        """
        if labels is not None:
            kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            slice_shapes=slice_shapes,
            grids=grids,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, T, C)
        loss = logits = losses = None
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        else:
            targets = labels[:, 1:]
            labelled = targets != -100
            found = self.lm_head(hidden[:, :-1][labelled], targets[labelled], each=token_losses)
            if token_losses:
                losses = found
            else:
                loss = found / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)
        return LlavaUHDOutput(
            loss=loss,
            token_losses=losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat rows for beams. Packed image tensors have no row axis: each row's images are repeated as a block."""
        images = {key: kwargs.pop(key) for key in ("pixel_values", "slice_shapes", "grids") if key in kwargs}
        if expand_size > 1 and images.get("grids") is not None:
            images = self.repeat_images(input_ids, expand_size, **images)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **images}

    def repeat_images(self, input_ids: Tensor, times: int, pixel_values: Tensor, slice_shapes: Tensor, grids: Tensor):
        """The image tensors of a batch in which every row occurs `times` times in a row."""
        slices_per_image = [rows * columns + 1 for rows, columns in grids.tolist()]
        patches = iter(pixel_values.split(slice_shapes.prod(1).tolist()))
        shapes = slice_shapes.split(slices_per_image)
        pixels = [torch.cat([next(patches) for _ in range(count)]) for count in slices_per_image]
        tokens = self.model.tokens_of_images(slice_shapes, grids)
        order, image = [], 0
        for wanted in (input_ids == self.config.image_token_id).sum(1).tolist():
            start, found = image, 0
            while found < wanted:
                found += tokens[image]
                image += 1
            order += list(range(start, image)) * times
        return {
            "pixel_values": torch.cat([pixels[index] for index in order]),
            "slice_shapes": torch.cat([shapes[index] for index in order]),
            "grids": grids[order],
        }

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, slice_shapes=None, grids=None, is_first_iteration=False, **kwargs
    ):
        """Images enter with the prompt only; later steps continue from the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs.update(pixel_values=pixel_values, slice_shapes=slice_shapes, grids=grids)
        return inputs


AutoModel.register(LlavaUHDConfig, LlavaUHDModel)
AutoModelForImageTextToText.register(LlavaUHDConfig, LlavaUHDForConditionalGeneration)
