"""Training samples: a record and its images -> token ids, labels and packed patches.

Records are read and checked once, before training starts: ids, speakers, one `<image>` per image. A sample whose
image turns out unreadable stops the run with its name; it is never replaced by its neighbour.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from llava.errors import UserError
from llava.images import ImageError, find_image, image_size, load_image
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from llava.prompts import IMAGE, with_image
from llava.records import Record, RecordError, check_for_training, images_of, messages_of, read_records

logger = logging.getLogger(__name__)


class ConversationDataset(Dataset):
    """Conversations of one or more record files.

    Args:
        paths: `.json` or `.jsonl` files, concatenated in order; naming a file twice weighs it twice.
        image_folder: root of the image paths; each file's own folder when None.
        processor: of the checkpoint that is trained; None when samples are only checked.
        max_length: longest sequence; see `encode`.
        image_mode: `overview` for stage 1, None for the processor's own.
    """

    def __init__(
        self,
        paths: list[str],
        processor: LlavaUHDProcessor | None,
        image_folder: str | None = None,
        max_length: int = 4096,
        image_mode: str | None = None,
    ):
        self.processor, self.max_length, self.image_mode = processor, max_length, image_mode
        self.records: list[Record] = []
        self.folders: list[str] = []
        for path in paths:
            before, problems = len(self.records), []
            for number, record in enumerate(read_records(path), 1):
                try:
                    check_for_training(record, f"{path} record {number}")
                except RecordError as error:
                    problems.append(str(error))
                self.records.append(record)
            if problems:
                total = len(self.records) - before
                raise RecordError(
                    f"{len(problems)} of {total} records of {path} cannot train; the first: {problems[0]}"
                )
            if len(self.records) == before:
                raise UserError(f"{path} holds no records. Fix: check the stage that should have written it")
            self.folders += [image_folder or str(Path(path).parent)] * (len(self.records) - before)

    @classmethod
    def of(
        cls, records: list[Record], folders: list[str], processor: LlavaUHDProcessor | None, max_length: int
    ) -> "ConversationDataset":
        """Records that are at hand, each with the folder of its images."""
        made = cls([], processor, max_length=max_length)
        made.records, made.folders = records, folders
        return made

    def __len__(self) -> int:
        return len(self.records)

    def image_paths(self, index: int) -> list[Path]:
        return [find_image(self.folders[index], name) for name in images_of(self.records[index])]

    def check_images(self) -> None:
        """Raise ImageError for the first image whose header cannot be read; reads no pixels."""
        for index in range(len(self)):
            self.image_sizes(index)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        try:
            return [image_size(path) for path in self.image_paths(index)]
        except ImageError as error:
            raise ImageError(f"record {self.records[index]['id']!r}: {error}") from error

    def sizes(self, progress: bool = False) -> np.ndarray:
        """(samples, 3) int64: text tokens, image tokens and patches of every sample; reads headers, no pixels.

        Text is counted message by message, so the sum may be off by a token where messages meet.

        Raises ImageError for the first image whose header cannot be read.
        """
        tokenizer = self.processor.tokenizer
        turn = len(self.processor.encode_conversation([{"role": "user", "content": ""}] * 2, [])[0])
        opening = len(self.processor.encode_conversation([{"role": "user", "content": ""}], [])[0])
        turn, opening = turn - opening, 2 * opening - turn  # tokens around one message, and before the first
        counts = np.zeros((len(self), 3), dtype=np.int64)
        with ThreadPoolExecutor(16) as readers:  # network disks answer many small reads at once
            headers = readers.map(self.image_sizes, range(len(self)))
            for index, sizes in enumerate(tqdm(headers, "reading image headers", len(self), disable=not progress)):
                for width, height in sizes:
                    shapes = self.processor.image_processor.layout(width, height, self.image_mode)[1]
                    counts[index, 1] += len(self.processor.image_ids(width, height, self.image_mode))
                    counts[index, 2] += sum(rows * columns for rows, columns in shapes)
        for start in range(0, len(self), 1000):
            batch = [messages_of(record) for record in self.records[start : start + 1000]]
            encoded = tokenizer([m["content"].replace(IMAGE, "") for ms in batch for m in ms], add_special_tokens=False)
            lengths = iter(map(len, encoded["input_ids"]))
            for offset, messages in enumerate(batch):
                own = sum(next(lengths) for _ in messages)
                system = messages[0]["role"] == "system"
                counts[start + offset, 0] = own + turn * len(messages) + (0 if system else opening)
        return counts

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample with the keys of `collator.py`, unbatched, plus the record's id. `~index`: nothing to learn."""
        record, learned = self.records[max(index, ~index)], index >= 0
        try:
            images = [load_image(path) for path in self.image_paths(max(index, ~index))]
        except ImageError as error:
            raise ImageError(f"record {record['id']!r}: {error}") from error
        ids, labels = self.encode(record, [image.size for image in images])
        sample: dict[str, Any] = {
            "id": record["id"],
            "input_ids": ids,
            "labels": labels if learned else [-100] * len(ids),
        }
        if images:
            sample.update(self.processor.image_processor(images, image_mode=self.image_mode))
        return sample

    def encode(self, record: Record, sizes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Token ids and labels, cut on the right to `max_length` with a warning.

        Raises UserError when cutting would take an image token or leave nothing to learn.
        """
        ids, labels = self.processor.encode_conversation(training_messages(record), sizes, self.image_mode)
        if len(ids) > self.max_length:
            lost_image = self.processor.image_token_id in ids[self.max_length :]
            if lost_image or all(label == -100 for label in labels[: self.max_length]):
                raise UserError(
                    f"record {record['id']!r} has {len(ids)} tokens; cutting it to --max_length {self.max_length} would "
                    "lose an image or the whole answer. Fix: raise --max_length, or drop the record"
                )
            logger.warning("record %r cut from %d to %d tokens", record["id"], len(ids), self.max_length)
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        return ids, labels


def training_messages(record: Record) -> list[dict[str, str]]:
    """The record's messages; a single `<image>` inside a user's message moves to its front, as in generation."""
    messages = messages_of(record)
    return [
        {**message, "content": with_image(message["content"])}
        if message["role"] == "user" and message["content"].count(IMAGE) == 1
        else message
        for message in messages
    ]
