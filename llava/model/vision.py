"""The CLIP tower over slices of any shape: packed uint8 patches in, patch features out.

Shapes: N slices, P patches of all slices together, D vision width. A slice of (rows, columns) patches has
rows*columns consecutive entries of P in row-major order. Slices of one shape run as one dense batch, so there is no
padding, no attention mask and no loop over slices. Weights and parameter names are those of HF's CLIPVisionModel.
Reference behaviour: a 24x24 table of positions, resized bicubically for every other shape, as in LLaVA-UHD.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel


class SliceEncoder(nn.Module):
    """HF's CLIP vision model, run up to `feature_layer` over packed slices.

    `image_mean` and `image_std` turn bytes into the tower's input inside the patch embedding: pixels stay uint8 until
    then, a quarter of the memory and transfer of float32.
    """

    def __init__(self, config: CLIPVisionConfig, feature_layer: int, image_mean: list[float], image_std: list[float]):
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.clip = CLIPVisionModel(config)
        self.layers_used = config.num_hidden_layers + 1 + feature_layer if feature_layer < 0 else feature_layer
        if not 0 < self.layers_used <= config.num_hidden_layers:
            raise ValueError(f"vision_feature_layer {feature_layer} is outside the tower's {config.num_hidden_layers}")
        self.positions: dict[tuple[int, int], Tensor] = {}  # resized position tables of a frozen tower

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that exist in the checkpoint but take no part in the forward pass."""
        unused = list(self.clip.post_layernorm.parameters())
        for layer in self.clip.encoder.layers[self.layers_used :]:
            unused += layer.parameters()
        return unused

    def forward(self, patches: Tensor, slice_shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Encode packed slices.

        Args:
            patches: (P, channels * patch * patch) uint8, channel-major within a patch.
            slice_shapes: N pairs (rows, columns).

        Returns:
            N tensors (rows * columns, D), in the order given. Groups of equal shape share memory.
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
        pieces = self.embed_patches(patches).split(counts)
        features: list[Tensor | None] = [None] * len(counts)
        for shape in dict.fromkeys(slice_shapes):
            members = [index for index, other in enumerate(slice_shapes) if other == shape]
            encoded = self.encode_group(torch.stack([pieces[index] for index in members]), shape)
            for index, feature in zip(members, encoded.unbind(), strict=True):
                features[index] = feature
        return features

    def embed_patches(self, patches: Tensor) -> Tensor:
        """(P, channels * patch**2) uint8 -> (P, D): normalisation folded into the patch convolution's weights.

        In float32 whatever the precision around it: bytes up to 255 against a folded bias cancel, and bfloat16 would
        lose a factor of three in accuracy.
        """
        weight = self.clip.embeddings.patch_embedding.weight  # (D, channels, patch, patch)
        with torch.autocast(weight.device.type, enabled=False):
            full = weight.float()
            mean = full.new_tensor(self.image_mean).view(-1, 1, 1)
            std = full.new_tensor(self.image_std).view(-1, 1, 1)
            folded = (full / (255 * std)).flatten(1)
            bias = -(full * (mean / std)).sum(dim=(1, 2, 3))
            return F.linear(patches.float(), folded, bias).to(weight.dtype)

    def encode_group(self, embedded: Tensor, shape: tuple[int, int]) -> Tensor:
        """(slices, rows*columns, D) patch embeddings of one shape -> features of the same shape."""
        embeddings = self.clip.embeddings
        cls = embeddings.class_embedding.expand(len(embedded), 1, -1)
        hidden = torch.cat([cls, embedded], dim=1) + self.position_table(shape)  # (slices, 1 + rows*columns, D)
        hidden = self.clip.pre_layrnorm(hidden)
        for layer in self.clip.encoder.layers[: self.layers_used]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]

    def position_table(self, shape: tuple[int, int]) -> Tensor:
        """(1 + rows*columns, D): CLS row kept, the square table resized bicubically in float32."""
        weight = self.clip.embeddings.position_embedding.weight
        side = self.config.image_size // self.config.patch_size
        if shape == (side, side):
            return weight
        frozen = not weight.requires_grad
        if frozen and shape in self.positions and self.positions[shape].device == weight.device:
            return self.positions[shape]
        if not frozen:
            return self.resize_positions(weight, side, shape)
        with torch.inference_mode(False):  # kept tables serve training too
            self.positions[shape] = self.resize_positions(weight, side, shape)
        return self.positions[shape]

    @staticmethod
    def resize_positions(weight: Tensor, side: int, shape: tuple[int, int]) -> Tensor:
        square = weight[1:].float().T.reshape(1, -1, side, side)  # (1, D, side, side)
        resized = F.interpolate(square, size=shape, mode="bicubic", align_corners=False)
        return torch.cat([weight[:1], resized.flatten(2)[0].T.to(weight.dtype)])
