"""Preference triples as other projects write them -> prompt, chosen, rejected, image.

Understood are, in any combination:

    prompt    `prompt`, else `question`, else `conversations`, else what `chosen` says before its last turn;
              a string, or messages with exactly one turn of the user's (system turns are left out)
    chosen, rejected    a string, one message, or messages of which the last is the assistant's
    messages  {"role", "content"} or {"from", "value"}; content a string, or parts {"type": "text"|"image"}
    image     `image`, else `images`: a path, a list of paths, or absent
    id        a string or whole number; where absent, made of the content, so that the same triple always gets the same
    scores    of chosen and rejected, where there are two numbers

Prompts without `<image>` get one per image, in front; where some are there already they stay.
"""

from collections.abc import Iterator
from typing import Any

from llava.ids import number_of
from llava.prompts import with_image
from llava.records import IMAGE, ROLES, Record, RecordError, dump, read_rows


def read_triples(path: str) -> Iterator[tuple[int, Record]]:
    """(row number, triple or {"id", "reason"}) of a `.json` list or `.jsonl` file. RecordError: it is neither."""
    for number, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise RecordError("the row is no JSON object")
            yield number, triple_of(row)
        except RecordError as error:
            identifier = row.get("id") if isinstance(row, dict) else None
            yield number, {"id": f"row {number}" if identifier is None else str(identifier), "reason": str(error)}


def triple_of(row: dict[str, Any]) -> Record:
    """id, image where there is one, prompt, chosen, rejected. Raises RecordError for a shape that is not understood."""
    for side in ("chosen", "rejected"):
        if side not in row:
            raise RecordError(f"field {side} is missing")
    prompt = next((row[name] for name in ("prompt", "question", "conversations") if row.get(name) is not None), None)
    if prompt is None:
        if not isinstance(row["chosen"], list):
            raise RecordError("neither prompt nor question is there")
        prompt = row["chosen"][:-1]
    image = row.get("image", row.get("images"))
    images = image if isinstance(image, list) else [] if image is None else [image]
    asked = asked_in(prompt)
    triple = {
        **({"image": image} if images else {}),
        "prompt": asked if IMAGE in asked else with_image(asked, len(images)),
        "chosen": said_in(row["chosen"]), "rejected": said_in(row["rejected"]),
    }  # fmt: skip
    scores = {"scores": row["scores"]} if is_two_numbers(row.get("scores")) else {}
    identifier = row.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or identifier == "":
        identifier = f"triple-{number_of(dump(triple)):016x}"
    return {"id": str(identifier), **triple, **scores}


def is_two_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, (int, float)) for item in value)


def asked_in(prompt: Any) -> str:
    """The question of a prompt: the string, or the only thing the user says."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in messages_in(prompt) if message[0] != "system"]
    if len(messages) > 1 and messages[-1][0] == "assistant":
        messages = messages[:-1]  # LLaVA's records say the answer too
    if [role for role, _ in messages] != ["user"]:
        raise RecordError("the prompt is no single question of the user's")
    return messages[0][1]


def said_in(answer: Any) -> str:
    """The text of a side: the string, or what the assistant says last."""
    if isinstance(answer, str):
        return answer
    messages = messages_in(answer)
    if not messages or messages[-1][0] != "assistant":
        raise RecordError("an answer does not end with the assistant's turn")
    return messages[-1][1]


def messages_in(value: Any) -> list[tuple[str, str]]:
    """(role, text) of one message or a list of them."""
    found = []
    for message in value if isinstance(value, list) else [value]:
        role = ROLES.get(str(message.get("role", message.get("from")))) if isinstance(message, dict) else None
        if role is None:
            raise RecordError("a message has no known speaker")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "\n".join(map(text_of_part, content))
        if not isinstance(content, str):
            raise RecordError("a message has no text")
        found.append((role, content))
    return found


def text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        return IMAGE
    raise RecordError("a part of a message is neither text nor image")
