"""Configuration of LLaVA-UHD: a CLIP tower over slices, a projector, any causal language model.

All sizes live here, so the toy model and the 7B model are the same code.
"""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

PROJECTORS = ("spatial_resampler", "mlp2x_gelu")


class LlavaUHDConfig(PreTrainedConfig):
    """Everything the model needs to know that is not a weight.

    Args:
        vision_config: a CLIPVisionConfig or its dict (ViT-L/14 at 336 when absent).
        text_config: the config of any causal LM or its dict, with `model_type` (Qwen2 when absent).
        projector_type: `spatial_resampler` (`resampler_grid`**2 tokens a slice) or `mlp2x_gelu` (one token a patch).
        resampler_grid: queries along one side of the resampler, 12 in the paper.
        resampler_heads: attention heads of the resampler; hidden size / 128 in the published model.
        resampler_roi_aligned: RoIAlign's half-pixel correction. Published checkpoints were trained without it.
        vision_feature_layer: which hidden state of the tower is used; -2 leaves the last layer out.
        image_mean, image_std: normalisation of the tower, folded into its patch embedding.
        image_token_id: the placeholder that image features replace; may lie outside the LM's vocabulary.
    """

    model_type = "llava_uhd"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "spatial_resampler"
    resampler_grid: int = 12
    resampler_heads: int | None = None
    resampler_roi_aligned: bool = True
    vision_feature_layer: int = -2
    image_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_token_id: int = 151646
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = as_config(self.vision_config, "clip_vision_model")
        self.text_config = as_config(self.text_config, "qwen2")
        if self.resampler_heads is None:
            self.resampler_heads = max(self.text_config.hidden_size // 128, 1)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.projector_type not in PROJECTORS:
            raise ValueError(f"projector_type is {self.projector_type!r}; choose one of {', '.join(PROJECTORS)}")
        if self.text_config.hidden_size % self.resampler_heads:
            raise ValueError(
                f"resampler_heads {self.resampler_heads} does not divide the LM's hidden size "
                f"{self.text_config.hidden_size}; choose a divisor"
            )
        super().__post_init__(**kwargs)


def as_config(config: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    """A config object from an object, a dict with `model_type`, or nothing (the default of `default_type`)."""
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", default_type)
    if model_type == "clip_vision_model" and not config:
        fields = {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14,
        }  # fmt: skip
    return CONFIG_MAPPING[model_type](**fields)


# `transformers serve` knows a model that sees by this table
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("llava_uhd", "LlavaUHDForConditionalGeneration")
AutoConfig.register("llava_uhd", LlavaUHDConfig)
