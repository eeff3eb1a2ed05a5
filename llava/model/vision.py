"""The CLIP tower over slices of any shape: packed uint8 patches in, patch features out.

Shapes: N slices, P patches of all slices together, D vision width. A slice of (rows, columns) patches has
rows*columns consecutive entries of P in row-major order. There is no padding and no attention mask. Weights
and parameter names are those of HF's CLIPVisionModel.
Reference behaviour: a 24x24 table of positions, resized bicubically for every other shape, as in LLaVA-UHD.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llava.model.packed_attention import PACKED_SDPA


class PatchProjection(nn.Conv2d):
    """CLIP's patch convolution over packed bytes: normalisation is folded into its weights.

    Pixels stay uint8 until here, a quarter of the memory and transfer of float32. The product is taken in float32
    whatever the precision around it: bytes up to 255 against a folded bias cancel, and bfloat16 would lose a factor of
    three in accuracy.
    """

    def __init__(self, config: CLIPVisionConfig, image_mean: list[float], image_std: list[float]):
        patch = config.patch_size
        super().__init__(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch, bias=False)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., channels * patch**2) uint8 -> (..., D)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            full = self.weight.float()  # (D, channels, patch, patch)
            mean = full.new_tensor(self.image_mean).view(-1, 1, 1)
            std = full.new_tensor(self.image_std).view(-1, 1, 1)
            folded = (full / (255 * std)).flatten(1)
            bias = -(full * (mean / std)).sum(dim=(1, 2, 3))
            return F.linear(patches.float(), folded, bias).to(self.weight.dtype)


class SliceEmbeddings(CLIPVisionEmbeddings):
    """Patches of slices -> the tower's input; parameter names are CLIP's."""

    def __init__(self, config: CLIPVisionConfig, image_mean: list[float], image_std: list[float]):
        super().__init__(config)
        self.patch_embedding = PatchProjection(config, image_mean, image_std)
        self.resized: dict[tuple[int, int], Tensor] = {}  # position tables of a frozen tower

    def forward(self, patches: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(P, channels * patch**2) uint8 -> (P + N, D): every slice's CLS token, then its patches; positions added."""
        embedded = self.patch_embedding(patches).split([rows * columns for rows, columns in shapes])
        whole = self.position_embedding(torch.arange(self.num_positions, device=patches.device))
        tables = {shape: self.position_table(shape, whole) for shape in dict.fromkeys(shapes)}
        cls = self.class_embedding[None]
        return torch.cat([
            torch.cat([cls, piece]) + tables[shape] for piece, shape in zip(embedded, shapes, strict=True)
        ])  # fmt: skip

    def position_table(self, shape: tuple[int, int], whole: Tensor) -> Tensor:
        """(1 + rows*columns, D): the CLS row kept, the square table resized bicubically in float32."""
        side = self.image_size // self.patch_size
        if shape == (side, side):
            return whole
        keep = not whole.requires_grad and not torch.is_inference_mode_enabled()  # kept tables serve training too
        if keep and shape in self.resized and self.resized[shape].device == whole.device:
            return self.resized[shape]
        square = whole[1:].float().T.reshape(1, -1, side, side)  # (1, D, side, side)
        resized = F.interpolate(square, size=shape, mode="bicubic", align_corners=False)
        table = torch.cat([whole[:1], resized.flatten(2)[0].T.to(whole.dtype)])
        if keep:
            self.resized[shape] = table
        return table


class SliceEncoder(nn.Module):
    """HF's CLIP vision model, run up to `feature_layer` over packed slices.

    All slices lie in one row; only attention looks at where one ends. Every module is called once a batch.
    """

    def __init__(self, config: CLIPVisionConfig, feature_layer: int, image_mean: list[float], image_std: list[float]):
        super().__init__()
        config = copy.deepcopy(config)
        if config._attn_implementation != "flash_attention_2":
            config._attn_implementation = PACKED_SDPA
        self.config = config
        self.clip = CLIPVisionModel(config)
        self.clip.embeddings = SliceEmbeddings(config, image_mean, image_std)
        self.layers_used = config.num_hidden_layers + 1 + feature_layer if feature_layer < 0 else feature_layer
        if not 0 < self.layers_used <= config.num_hidden_layers:
            raise ValueError(f"vision_feature_layer {feature_layer} is outside the tower's {config.num_hidden_layers}")

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that exist in the checkpoint but take no part in the forward pass."""
        unused = list(self.clip.post_layernorm.parameters())
        for layer in self.clip.encoder.layers[self.layers_used :]:
            unused += layer.parameters()
        return unused

    def forward(self, patches: Tensor, slice_shapes: list[tuple[int, int]]) -> Tensor:
        """Encode packed slices.

        Args:
            patches: (P, channels * patch * patch) uint8, channel-major within a patch.
            slice_shapes: N pairs (rows, columns).

        Returns:
            (P, D) features, slices in the order given.
        """
        counts = [rows * columns for rows, columns in slice_shapes]
        if sum(counts) != len(patches):
            raise ValueError(f"slice_shapes ask for {sum(counts)} patches, pixel_values holds {len(patches)}")
        pixels_per_patch = self.config.num_channels * self.config.patch_size**2
        if patches.ndim != 2 or patches.shape[1] != pixels_per_patch:
            raise ValueError(
                f"pixel_values is {tuple(patches.shape)}; this tower wants (patches, {pixels_per_patch}). "
                "Was the batch made by another checkpoint's processor?"
            )
        if patches.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values is {patches.dtype}; this tower wants bytes (torch.uint8) and normalises them itself"
            )
        order = sorted(range(len(counts)), key=lambda index: slice_shapes[index])  # equal lengths run as one batch
        pieces = patches.split(counts)
        shapes, lengths = [slice_shapes[index] for index in order], [counts[index] + 1 for index in order]
        hidden = self.clip.embeddings(torch.cat([pieces[index] for index in order]), shapes)
        hidden = self.clip.pre_layrnorm(hidden)[None]  # (1, P + N, D)
        bounds = torch.tensor([0, *lengths], device=hidden.device).cumsum(0, dtype=torch.int32)
        packed = {"lengths": lengths, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        packed.update(max_length_q=max(lengths), max_length_k=max(lengths))
        for layer in self.clip.encoder.layers[: self.layers_used]:
            hidden = layer(hidden, attention_mask=None, **packed)
        features = dict(zip(order, hidden[0].split(lengths), strict=True))
        return torch.cat([features[index][1:] for index in range(len(counts))])
