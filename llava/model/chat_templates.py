"""Chat templates: how a conversation becomes text, for each family of language models.

`{% generation %}` marks what the assistant says, its end token included: these tokens are the default labels. A
message's `content` is a string, in which `<image>` stands for an image, or a list of `image` and `text` parts as
chat-completions servers send it.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llava.errors import UserError

TEXT = (
    "{%- if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{%- set parts = namespace(text='') %}{% for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{% set parts.text = parts.text + part['text'] %}"
    "{%- else %}{% set parts.text = parts.text + '<image>\n' %}{% endif %}{% endfor %}"
    "{%- set text = parts.text %}{% endif %}"
)

# Qwen2; the conversation `qwen_1_5` of published checkpoints.
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}" + TEXT + "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- text + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- text + '<|im_end|>' }}{% endif %}{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)

# Llama 3 and 3.1 without the dates and tools of its own template: the text does not depend on the day it is made.
LLAMA3 = (
    "{{- '<|begin_of_text|>' }}"
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>' }}{% endif %}"
    "{%- for message in messages %}" + TEXT + "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- text + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- text + '<|eot_id|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class ChatFormat(NamedTuple):
    """A template with the token that ends a turn and the ones that may serve as padding, best first."""

    template: str
    end_of_turn: str
    padding: tuple[str, ...]


FORMATS = {
    "<|im_start|>": ChatFormat(CHATML, "<|im_end|>", ("<|endoftext|>",)),
    "<|start_header_id|>": ChatFormat(LLAMA3, "<|eot_id|>", ("<|finetune_right_pad_id|>", "<|end_of_text|>")),
}  # the token that opens a turn -> the format


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: object, image_token: str = "<image>") -> None:
    """Give `tokenizer` its family's chat template, the end of a turn as EOS, a padding token and `image_token`.

    Raises:
        UserError: the vocabulary of `folder` has the turn tokens of no known family.
    """
    vocabulary = tokenizer.get_vocab()
    chat = next((chat for opens, chat in FORMATS.items() if opens in vocabulary), None)
    if chat is None:
        raise UserError(
            f"the tokenizer in {folder} has none of {', '.join(FORMATS)}, so its chat format is unknown. "
            "Fix: use a Qwen2 (ChatML) or Llama 3 language model"
        )
    tokenizer.chat_template = chat.template
    tokenizer.eos_token = chat.end_of_turn  # base models' folders name the end of text here
    if tokenizer.pad_token is None:
        tokenizer.pad_token = next(token for token in chat.padding if token in vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
