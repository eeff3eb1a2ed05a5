"""What is asked for and what comes back: sampling settings, prompts, draws, completions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.model.processing_llava_uhd import LlavaUHDProcessor


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn. `temperature` 0 is greedy; `num_beams` above 1 uses transformers' beam search."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    num_beams: int = 1
    max_new_tokens: int = 1200

    def __post_init__(self):
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "num_beams": self.num_beams >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, valid in checks.items():
            if not valid:
                raise UserError(f"{name} {getattr(self, name)} makes no sense; see --help")


@dataclass(frozen=True)
class Draw:
    """One wanted candidate: which of the prompt's messages it answers, and its seed."""

    message: int
    seed: int


@dataclass(frozen=True)
class Prompt:
    """What is asked about some images: messages that begin alike, with one `<image>` per image, and wanted candidates."""

    images: list[Image.Image]
    messages: list[str]
    draws: list[Draw]


@dataclass(frozen=True)
class Completion:
    """A candidate's text; `finish_reason` is `stop` or `length` (cut at max_new_tokens)."""

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Key = Any
Finished = list[tuple[Draw, Completion]]
More = Callable[[Key, Finished], list[Draw]]


def completion_of(processor: LlavaUHDProcessor, ids: list[int], stopped: bool, prompt_tokens: int) -> Completion:
    text = processor.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True).strip()
    return Completion(text, "stop" if stopped else "length", len(ids), prompt_tokens)


def end_tokens(processor: LlavaUHDProcessor) -> list[int]:
    """What ends an answer: the turn's end, or the text's end (Qwen2: `<|im_end|>`, `<|endoftext|>`)."""
    tokenizer = processor.tokenizer
    return sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})
