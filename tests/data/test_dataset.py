import json

import pytest
import torch
from PIL import Image

from llava.data.collator import Collator
from llava.data.dataset import ConversationDataset
from llava.errors import UserError


def write(tmp_path, *records):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return str(path)


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (72, 48), "red").save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "b.png")
    return tmp_path


def test_batch_contract(folder, processor):
    path = write(
        folder,
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat color?", "red")},
        {"id": "2", "conversations": turns("What is 2 plus 3?", "5")},
        {"id": "3", "image": ["b.png", "a.png"], "conversations": turns("<image>\n<image>\nSame color?", "no")},
    )
    dataset = ConversationDataset([path], processor)
    samples = [dataset[index] for index in range(3)]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    images = {"pixel_values", "slice_shapes", "grids"}
    assert set(batch) == {"input_ids", "position_ids", "cu_seq_lens", "labels", "ids"} | images
    assert batch["grids"].tolist() == [[1, 2], [0, 0], [1, 2]]
    assert len(batch["slice_shapes"]) == 3 + 1 + 3
    assert len(batch["pixel_values"]) == int(batch["slice_shapes"].prod(1).sum())
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["ids"] == ["1", "2", "3"]
    bounds = batch["cu_seq_lens"].tolist()
    for sample, start, stop in zip(samples, bounds, bounds[1:], strict=False):
        assert batch["input_ids"][0, start:stop].tolist() == sample["input_ids"]
        assert batch["position_ids"][0, start:stop].tolist() == list(range(stop - start))
        assert batch["labels"][0, start].item() == -100
        assert batch["labels"][0, start + 1 : stop].tolist() == sample["labels"][1:]
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "red<|im_end|>5<|im_end|>no<|im_end|>"


def test_padded_batch_contract(folder, processor):
    path = write(
        folder,
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat color?", "red")},
        {"id": "2", "conversations": turns("What is 2 plus 3?", "5")},
    )
    dataset = ConversationDataset([path], processor)
    batch = Collator(processor.tokenizer.pad_token_id, packing=False)([dataset[0], dataset[1]])
    images = {"pixel_values", "slice_shapes", "grids"}
    assert set(batch) == {"input_ids", "attention_mask", "labels", "ids"} | images
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert placeholders == [27, 0]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["red<|im_end|>", "5<|im_end|>"]
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all()


def test_text_only_batch_has_no_image_keys(folder, processor):
    path = write(folder, {"id": "2", "conversations": turns("What is 2 plus 3?", "5")})
    dataset = ConversationDataset([path], processor)
    assert set(Collator(0)([dataset[0]])) == {"input_ids", "position_ids", "cu_seq_lens", "labels", "ids"}


def test_a_sample_of_negative_index_has_nothing_to_learn(folder, processor):
    path = write(folder, {"id": "2", "conversations": turns("What is 2 plus 3?", "5")})
    dataset = ConversationDataset([path], processor)
    assert dataset[~0]["input_ids"] == dataset[0]["input_ids"]
    assert set(dataset[~0]["labels"]) == {-100}


def test_sizes_are_those_of_the_samples(processor, world):
    dataset = ConversationDataset([str(world / "instructions.json"), str(world / "text_only.jsonl")], processor)
    sizes = dataset.sizes()
    for index in range(len(dataset)):
        sample = dataset[index]
        assert abs(sizes[index, :2].sum() - len(sample["input_ids"])) <= 1
        assert sizes[index, 1] in (
            0,
            sample["input_ids"].count(processor.image_token_id) + separators(sample, processor),
        )
        assert sizes[index, 2] == len(sample.get("pixel_values", ()))


def separators(sample, processor) -> int:
    """Newlines and comma of a sliced image."""
    rows = sum(3 * int(rows) + 1 for rows, _ in sample.get("grids", torch.zeros(0, 2)) if rows)
    return int(rows)


def test_a_placeholder_behind_the_question_moves_to_its_front(folder, processor):
    behind = write(folder, {"id": "1", "image": "b.png", "conversations": turns("What color?\n<image>", "blue")})
    first = ConversationDataset([behind], processor)[0]["input_ids"]
    front = write(folder, {"id": "1", "image": "b.png", "conversations": turns("<image>\nWhat color?", "blue")})
    assert first == ConversationDataset([front], processor)[0]["input_ids"]


def test_overview_only_drops_the_slices(folder, processor):
    path = write(folder, {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat color?", "red")})
    sample = ConversationDataset([path], processor, image_mode="overview")[0]
    assert sample["grids"].tolist() == [[0, 0]]
    assert sample["input_ids"].count(processor.image_token_id) == 9


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "1", "image": "a.png", "conversations": turns("What?", "red")}, "1 images but 0 <image>"),
        ({"id": "1", "image": "a.png", "conversations": turns("<image><image>", "red")}, "1 images but 2 <image>"),
        ({"id": "1", "conversations": turns("<image>", "red")}, "0 images but 1 <image>"),
        ({"id": "1", "conversations": turns("What?", "red")[:1]}, "speakers are"),
        ({"id": "1", "conversations": turns("What?", " ")}, "every answer is empty"),
    ],
)
def test_records_that_cannot_train_are_refused_before_training(folder, processor, record, message):
    with pytest.raises(UserError, match=message) as error:
        ConversationDataset([write(folder, record)], processor)
    assert "records.json record 1, id '1'" in str(error.value)
    assert "Fix:" in str(error.value)


def test_unreadable_image_stops_with_its_record(folder, processor):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    path = write(folder, {"id": "x7", "image": "broken.png", "conversations": turns("<image>\nHi", "red")})
    with pytest.raises(UserError, match=r"record 'x7'.*broken\.png"):
        ConversationDataset([path], processor)[0]
    missing = write(folder, {"id": "x8", "image": "gone.png", "conversations": turns("<image>\nHi", "red")})
    with pytest.raises(UserError, match=r"record 'x8'.*gone\.png"):
        ConversationDataset([missing], processor).check_images()


def test_empty_file_is_an_error(folder, processor):
    with pytest.raises(UserError, match="holds no records"):
        ConversationDataset([write(folder)], processor)


def test_long_answers_are_cut_and_lost_images_refused(folder, processor):
    path = write(folder, {"id": "1", "image": "a.png", "conversations": turns("<image>\nHi", "red " * 50)})
    whole = ConversationDataset([path], processor)[0]
    cut = ConversationDataset([path], processor, max_length=len(whole["input_ids"]) - 10)[0]
    assert cut["input_ids"] == whole["input_ids"][:-10]
    with pytest.raises(UserError, match="lose an image or the whole answer"):
        ConversationDataset([path], processor, max_length=40)[0]


def test_several_files_with_their_own_folders(folder, processor, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (40, 40), "green").save(other / "b.png")
    record = {"id": "1", "image": "b.png", "conversations": turns("<image>\nWhat color?", "x")}
    dataset = ConversationDataset([write(folder, record), write(other, record)], processor)
    assert not torch.equal(dataset[0]["pixel_values"], dataset[1]["pixel_values"])
