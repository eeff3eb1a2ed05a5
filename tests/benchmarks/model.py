"""Speed of the model's parts against the straightforward way to compute the same.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.model

The straightforward side has the shape of the published code: pictures sliced twice and kept as floating point,
one slice after another, RoIAlign by gathering four corners a sample, batches padded to the longest slice.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor, patchify
from llava.model.resampler import SpatialResampler, pooled_size
from llava.model.slicing import plan_slices
from llava.model.vision import SliceEncoder
from tests.benchmarks.compare import compare, header


def close(one, other) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def gather_roi_align(grid: torch.Tensor, regions: int, bins: tuple[int, int], aligned: bool) -> torch.Tensor:
    """RoIAlign of (C, h, w) over regions x regions boxes by sampling: (regions**2, bins, C)."""
    height, width = grid.shape[1:]

    def axis(length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shift, box = (0.5, length / regions) if aligned else (0.0, max(length / regions, 1.0))
        samples = math.ceil(box / count)
        start = torch.arange(regions)[:, None, None] * (length / regions) - shift
        steps = torch.arange(count)[None, :, None] + (torch.arange(samples)[None, None] + 0.5) / samples
        at = start + box / count * steps  # (regions, count, samples)
        return at, (at >= -1.0) & (at <= length)

    (y, y_in), (x, x_in) = axis(height, bins[0]), axis(width, bins[1])
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.long(), x.long()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    dy, dx = y - y0, x - x0
    flat = grid.flatten(1).T  # (h*w, C)
    total = 0
    for rows, row_weight in ((y0, 1 - dy), (y1, dy)):
        for columns, column_weight in ((x0, 1 - dx), (x1, dx)):
            index = rows[:, None, :, None, :, None] * width + columns[None, :, None, :, None, :]
            weight = (row_weight * y_in)[:, None, :, None, :, None] * (column_weight * x_in)[None, :, None, :, None, :]
            total = total + flat[index] * weight[..., None]
    pooled = total.mean(dim=(4, 5))  # (regions, regions, p, q, C)
    return pooled.flatten(2, 3).flatten(0, 1)


def plain_attention(module: SpatialResampler) -> torch.nn.MultiheadAttention:
    """PyTorch's own attention with the resampler's weights."""
    attention = torch.nn.MultiheadAttention(module.attn.embed_dim, module.attn.num_heads)
    attention.load_state_dict(module.attn.state_dict())
    return attention.eval()


def resample_one_by_one(module: SpatialResampler, slices: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(S, h*w, D) -> (S, Q, C): one slice after another, keys and values pooled as they are, then attended."""
    out, attention = [], plain_attention(module)
    for features in slices:
        x = module.ln_kv(module.kv_proj(features))
        square = module.pos_embed.T.reshape(1, -1, module.grid, module.grid)
        positions = F.interpolate(square, size=shape, mode="bicubic", align_corners=False).flatten(2)[0].T
        keys, values = ((x + positions).T.unflatten(1, shape), x.T.unflatten(1, shape))
        bins = pooled_size(*shape)
        k, v = (gather_roi_align(each, module.grid, bins, module.aligned).transpose(0, 1) for each in (keys, values))
        q = (module.ln_q(module.query) + module.pos_embed)[None]
        out.append(module.ln_post(attention(q, k, v, need_weights=False)[0][0]) @ module.proj)
    return torch.stack(out)


@torch.no_grad()
def bench_resampler(slices: int = 6, width: int = 1792, rounds: int = 5) -> float:
    shape = (22, 26)
    module = SpatialResampler(1024, width, grid=12, heads=width // 128, aligned=False).eval()
    module.reset_parameters()
    features = torch.randn(slices, shape[0] * shape[1], 1024)
    return compare(
        f"resampler, width {width}, {slices} slices of 22x26",
        lambda: resample_one_by_one(module, features, shape),
        lambda: module(features.flatten(0, 1), [shape] * len(features)).unflatten(0, (len(features), -1)),
        close,
        rounds,
    )


def jpeg(width: int = 640, height: int = 480) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def tensors_slice_by_slice(data: bytes, processor: CLIPImageProcessorPil) -> list[torch.Tensor]:
    """One picture as the published code prepares it: slices (n, 3, h, w) and overview (3, h, w), normalised floats."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    plan = plan_slices(*image.size)
    (columns, rows), (width, height) = plan.grid, plan.slice_size
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(rows) for x in range(columns)]
    for _ in range(2):  # once to know whether to augment; the first result is thrown away
        overview = image.resize(plan.overview_size, Image.Resampling.BICUBIC)
        whole = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
        pieces = [*(whole.crop(box) for box in boxes), overview]
    tensors = [
        processor(piece, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
        for piece in pieces
    ]
    return [torch.stack(tensors[:-1]), tensors[-1]]


def bench_pixels(rounds: int = 15) -> float:
    data, clip, uhd = jpeg(), CLIPImageProcessorPil(), LlavaUHDImageProcessor()
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (clip.image_mean, clip.image_std))

    def check(floats: list[torch.Tensor], packed) -> None:
        pieces = [*floats[0].numpy(), floats[1].numpy()]
        restored = [np.rint((piece * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0) for piece in pieces]
        patches = np.concatenate([patchify(Image.fromarray(piece), 14) for piece in restored])
        assert np.array_equal(patches, packed["pixel_values"].numpy())

    return compare(
        "image to patches, 640x480 JPEG",
        lambda: tensors_slice_by_slice(data, clip),
        lambda: uhd(Image.open(io.BytesIO(data))),
        check,
        rounds,
    )


@torch.no_grad()
def bench_encoder(rounds: int = 5) -> float:
    config = CLIPVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, image_size=336, patch_size=14
    )  # fmt: skip
    encoder = SliceEncoder(config, -2, [0.5] * 3, [0.25] * 3).eval()
    plain = CLIPVisionModel(config).eval()
    plain.load_state_dict(encoder.clip.state_dict())
    shapes = [(24, 24)] + [(20, 27)] * 4 + [(20, 27), (12, 44)]
    counts = [rows * columns for rows, columns in shapes]
    patches = torch.randint(0, 256, (sum(counts), 588), dtype=torch.uint8)

    def padded() -> list[torch.Tensor]:
        """All slices in one batch, padded to the longest, all layers, with a mask."""
        clip = encoder.clip
        rows = []
        for piece, shape in zip(patches.split(counts), shapes, strict=True):
            rows.append(clip.pre_layrnorm(clip.embeddings(piece, [shape])))
        hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        valid = torch.arange(hidden.shape[1])[None] <= torch.tensor(counts)[:, None]
        mask = torch.zeros(len(rows), 1, 1, hidden.shape[1]).masked_fill(~valid[:, None, None], torch.finfo().min)
        states = [hidden]
        for layer in plain.encoder.layers:
            states.append(layer(states[-1], attention_mask=mask.expand(-1, 1, hidden.shape[1], -1)))
        return [state[1 : count + 1] for state, count in zip(states[-2], counts, strict=True)]

    def check(one: list[torch.Tensor], other: torch.Tensor) -> None:
        close(torch.cat(one), other)

    return compare("encoder, 12 layers, 7 slices of 3 shapes", padded, lambda: encoder(patches, shapes), check, rounds)


def main() -> None:
    header()
    bench_pixels()
    bench_encoder()
    bench_resampler()


if __name__ == "__main__":
    main()
