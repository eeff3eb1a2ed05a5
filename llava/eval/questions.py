"""Questions in VLMEvalKit's TSV format: rows, their images, what the model is asked.

A row has `index`, `image` (base64, a list of base64, or another row's index) or `image_path`, `question`, `answer`,
options `A`.. for multiple choice, and optionally `hint`, `category`, `split`.
"""

import ast
import base64
import csv
import io
import string
from pathlib import Path

from llava.errors import UserError
from llava.prompts import ANSWER_LETTER, ANSWER_SHORT, CAPTION_DEFAULT

OPTION_LETTERS = string.ascii_uppercase[:9]  # columns named J.. occur as data columns in some TSVs
Row = dict[str, str]


def read_tsv(path: str | Path, images: bool = True) -> list[Row]:
    """The rows of a benchmark; without `images` those columns hold only whether there is one.

    Raises UserError when a needed column or row is missing.
    """
    csv.field_size_limit(1 << 30)
    if not Path(path).is_file():
        raise UserError(f"{path} is no file. Fix: name VLMEvalKit TSV files, comma-separated")
    with Path(path).open(newline="", encoding="utf-8") as file:
        read = csv.DictReader(file, delimiter="\t", restval="")
        rows = [row if images or "image" not in row else {**row, "image": row["image"][:1]} for row in read]
    if not rows:
        raise UserError(f"{path} holds no questions")
    if "question" not in rows[0] and "coco" in Path(path).stem.lower():
        rows = [{**row, "question": CAPTION_DEFAULT} for row in rows]
    for column in ("index", "question", "answer"):
        if column not in rows[0]:
            raise UserError(f"{path} has no column {column!r}; VLMEvalKit TSVs have index, image, question, answer")
    if len({row["index"] for row in rows}) < len(rows):
        raise UserError(f"{path} uses an index twice; answers are matched by index")
    if "image" not in rows[0] and "image_path" not in rows[0]:
        raise UserError(f"{path} has neither an image nor an image_path column")
    return rows


def images_of_row(row: Row, by_index: dict[str, Row], folder: Path) -> list:
    """The row's PIL images. A value of 64 characters or fewer names the row whose image is meant."""
    from PIL import Image

    from llava.images import FORMATS, ImageError, find_image, load_image, to_rgb

    value = row.get("image", "")
    if value and len(value) <= 64 and value in by_index:
        value = by_index[value]["image"]
    if not value:
        return [load_image(find_image(folder, row["image_path"]))]
    try:
        encoded = ast.literal_eval(value) if value.startswith("[") else [value]
        decoded = [Image.open(io.BytesIO(base64.b64decode(item, validate=True)), formats=FORMATS) for item in encoded]
        return [to_rgb(image) for image in decoded]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"row {row['index']}: the image cannot be decoded: {error}") from error


def options_of(row: Row) -> dict[str, str]:
    return {letter: row[letter] for letter in OPTION_LETTERS if row.get(letter, "").strip()}


def is_judgement(row: Row) -> bool:
    return row["answer"].strip().lower() in ("yes", "no")


def question_text(row: Row, short: bool = True) -> str:
    """What the model is asked, in the wording of LLaVA's instruction data; `short`: an open question wants a short answer."""
    question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
    options = options_of(row)
    if not options:
        return f"{question}\n{ANSWER_SHORT}" if short else question
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"{question}\n{listed}\n{ANSWER_LETTER}"
