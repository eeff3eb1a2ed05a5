import pytest
import torch
from PIL import Image


def names(processor, ids):
    """Token ids as a readable string; runs of image placeholders as [n]."""
    out, run = [], 0
    for token in [*ids, None]:
        if token == processor.image_token_id:
            run += 1
            continue
        if run:
            out.append(f"[{run}]")
            run = 0
        if token is not None:
            out.append(processor.tokenizer.decode([token]))
    return "".join(out)


def test_token_layout_without_slices(processor):
    assert names(processor, processor.image_ids(48, 48)) == "[9]"


def test_token_layout_of_two_slices(processor):
    # two columns, one row: 3 feature rows of 2*3 tokens, a comma, the overview
    assert names(processor, processor.image_ids(72, 48)) == "[6]\n[6]\n[6]\n,[9]"


def test_token_layout_of_seven_slices(processor):
    assert names(processor, processor.image_ids(336, 48)) == "[21]\n[21]\n[21]\n,[9]"


def test_token_layout_of_a_single_column(processor):
    assert names(processor, processor.image_ids(48, 72)) == "[3]\n" * 6 + ",[9]"


def test_published_token_layouts(processor):
    processor.single_column_comma = False  # what published checkpoints saw: a newline where the comma belongs
    assert names(processor, processor.image_ids(48, 72)) == "[3]\n" * 6 + "\n[9]"
    assert names(processor, processor.image_ids(72, 48)) == "[6]\n[6]\n[6]\n,[9]"
    processor.image_processor.slice_layout = "per_slice"  # LLaVA-UHD v1
    assert names(processor, processor.image_ids(48, 72)) == "[9]\n[9]\n[9]"
    assert names(processor, processor.image_ids(100, 84)) == "[9],[9]\n[9],[9]\n[9]"
    assert names(processor, processor.image_ids(48, 48)) == "[9]"


def test_per_slice_features_come_slice_after_slice(processor, model):
    image = Image.effect_noise((100, 84), 60).convert("RGB")
    processor.image_processor.slice_layout = "per_slice"
    batch = processor.image_processor(image)
    assert batch["grids"].tolist() == [[4, 1]]
    features = model.model.encode_images(**batch)
    shape = tuple(batch["slice_shapes"][0].tolist())
    patches = shape[0] * shape[1]
    alone = model.model.vision_tower(batch["pixel_values"][patches : 2 * patches], [shape])
    second = model.model.projector(alone, [shape])
    torch.testing.assert_close(features[9:18], second, rtol=1e-4, atol=1e-5)


def test_overview_only(processor):
    assert names(processor, processor.image_ids(336, 48, image_mode="overview")) == "[9]"


def test_conversation_and_labels(processor):
    messages = [
        {"role": "user", "content": "<image>\nWhat color?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "top left"},
    ]
    ids, labels = processor.encode_conversation(messages, [(48, 48)])
    assert names(processor, ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n[9]\nWhat color?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>\n"
    )
    assert len(ids) == len(labels)
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(learned) == "red<|im_end|>top left<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_labels_of_published_checkpoints(processor):
    processor.label_policy = "legacy_qwen"
    messages = [{"role": "user", "content": "<image>\nWhat\ncolor?"}, {"role": "assistant", "content": "red"}]
    ids, labels = processor.encode_conversation(messages, [(48, 48)])
    learned = processor.tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
    assert learned == (
        "<|im_start|>\n<|im_end|>\n"  # of the system turn: turn tokens and newlines alone
        "<|im_start|>\n\n\n<|im_end|>\n"  # of the user turn
        "<|im_start|>assistant\nred<|im_end|>\n"
    )


def test_unknown_choices_are_named(processor):
    from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor

    with pytest.raises(ValueError, match="slice_layout is 'zigzag'; choose one of stitched, per_slice"):
        LlavaUHDImageProcessor(slice_layout="zigzag")
    with pytest.raises(ValueError, match="label_policy is 'all'; choose one of assistant, legacy_qwen"):
        type(processor)(processor.image_processor, processor.tokenizer, label_policy="all")


def test_system_message_replaces_the_default(processor):
    ids, _ = processor.encode_conversation(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], []
    )
    assert names(processor, ids) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_prompt_opens_the_assistant_turn_and_pads_left(processor):
    long = processor.prompt([{"role": "user", "content": "<image>\nWhat color is it?"}])
    short = processor.prompt([{"role": "user", "content": "Hi"}])
    assert long.endswith("<|im_start|>assistant\n")
    batch = processor(images=[Image.new("RGB", (72, 48))], text=[long, short])
    assert batch["attention_mask"].sum(1).tolist()[0] == batch["input_ids"].shape[1]
    assert batch["attention_mask"][1, 0] == 0
    assert batch["input_ids"][1, -1] == batch["input_ids"][0, -1]
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 18 + 9


@pytest.mark.parametrize(("text", "images"), [("<image><image>", 1), ("no picture", 1), ("<image>", 0)])
def test_counts_that_differ_are_refused(processor, text, images):
    with pytest.raises(ValueError, match="image"):
        processor(images=[Image.new("RGB", (40, 40))] * images, text=[text])


def test_real_vocabulary_has_the_reference_separators(real_data):
    from transformers import AutoTokenizer

    from llava.model.chat_templates import CHATML
    from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
    from llava.model.processing_llava_uhd import LlavaUHDProcessor

    tokenizer = AutoTokenizer.from_pretrained(real_data / "qwen2-tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    qwen = LlavaUHDProcessor(LlavaUHDImageProcessor(), tokenizer, chat_template=CHATML)
    assert (qwen.newline_token_id, qwen.comma_token_id, qwen.image_token_id) == (198, 11, 151646)
    assert len(qwen.image_ids(640, 480)) == 745
    assert len(qwen.image_ids(300, 1024)) == 613


@pytest.fixture
def llama_processor(llama):
    from transformers import AutoTokenizer

    from llava.model.chat_templates import prepare_tokenizer
    from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
    from llava.model.processing_llava_uhd import LlavaUHDProcessor

    tokenizer = AutoTokenizer.from_pretrained(llama)
    prepare_tokenizer(tokenizer, llama)
    image_processor = LlavaUHDImageProcessor(resolution=48, patch_size=8)
    return LlavaUHDProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, resampler_grid=3)


def test_llama_3_conversation_and_labels(llama_processor):
    messages = [{"role": "user", "content": "<image>\nWhat color?"}, {"role": "assistant", "content": "red"}]
    ids, labels = llama_processor.encode_conversation(messages, [(48, 48)])
    assert names(llama_processor, ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n[9]\nWhat color?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nred<|eot_id|>"
    )
    assert llama_processor.tokenizer.decode([label for label in labels if label != -100]) == "red<|eot_id|>"
    assert llama_processor.tokenizer.eos_token == "<|eot_id|>"
    assert llama_processor.tokenizer.pad_token == "<|end_of_text|>"
    assert llama_processor.prompt(messages[:1]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_content_in_parts_as_servers_send_it(processor, llama_processor):
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What color?"}]
    for each in (processor, llama_processor):
        whole = each.prompt([{"role": "user", "content": "<image>\nWhat color?"}])
        assert each.prompt([{"role": "user", "content": parts}]) == whole


def test_a_vocabulary_of_no_known_family_is_refused():
    from transformers import Qwen2Tokenizer

    from llava.errors import UserError
    from llava.model.chat_templates import prepare_tokenizer

    with pytest.raises(UserError, match=r"tokenizer in here has none of <\|im_start\|>, <\|start_header_id\|>"):
        prepare_tokenizer(Qwen2Tokenizer().train_new_from_iterator(["text"], 300), "here")


def test_saved_processor_is_the_same(processor, tmp_path):
    from llava.model.processing_llava_uhd import LlavaUHDProcessor

    processor.save_pretrained(tmp_path)
    again = LlavaUHDProcessor.from_pretrained(tmp_path)
    for size in [(48, 48), (100, 84), (48, 72)]:
        assert again.image_ids(*size) == processor.image_ids(*size)
    messages = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "red"}]
    assert again.encode_conversation(messages, [(90, 90)]) == processor.encode_conversation(messages, [(90, 90)])
