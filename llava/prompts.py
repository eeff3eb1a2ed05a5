"""Every prompt the pipeline sends and every response format it reads back, side by side. Standard library only.

Chain-of-Description (CoD, five steps) and structured chain-of-thought (CoT, four steps) share one layout: a heading
line "Step k: ...", the step's text, a blank line. `render_steps` writes it, `parse_steps` reads it back; parsing
survives Markdown bold, several paragraphs in a step, and missing or truncated steps. Headings, tags and one-line
instructions are the published ones (arXiv 2503.12303 and its code); the annotator prompt is our own wording.
"""

import re

from llava.errors import UserError

COD_HEADINGS = (
    "Step 1: Extract salient content by identifying the key elements that define the image or document.",
    "Step 2: Analyze detailed information, focusing on instance-level attributes such as low-level and fine-grained "
    "details.",
    "Step 3: Consider relational-level attributes, analyzing interactions between elements and their spatial "
    "organization.",
    "Step 4: Examine marginal or peripheral content to ensure no important information is missed.",
    "Step 5: Organize all observations into a detailed, cohesive description.",
)
COT_HEADINGS = (
    "Step 1: Clarify the task objective.",
    "Step 2: Extract the crucial visual information from the image.",
    "Step 3: Generate detailed reasoning to solve the task.",
    "Step 4: Conclude the task with an answer.",
)
COT_TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")  # LLaVA-CoT's tags, in the order of COT_HEADINGS

IMAGE = "<image>"
DESCRIBE_STEPS = " Describe the image step-by-step."
PUBLISHED_DESCRIBE_STEPS = " Describe the image step by step."  # what the paper's code put into annotated questions
ANSWER_STEPS = "Answer the question step-by-step."
ANSWER_SHORT = "Answer the question using a single word or phrase."
ANSWER_LETTER = "Answer with the option's letter from the given choices directly."
COD_DEFAULT = "Please generate a detailed caption of this image. Describe the image step-by-step."
CAPTION_DEFAULT = "Please generate a detailed caption of this image. Be as descriptive as possible."

CAPTION_STYLES = ("cod-default", "cod-conv", "default")
REASONING_STYLES = ("cot-default", "default")

STEP_LINE = re.compile(r"\n[ \t>#*_-]*Step[ \t]*(\d+)[*_]*[ \t]*:", re.IGNORECASE)  # a text begins with a new line
TITLES = {  # step -> what its headings say after the number
    number: tuple(
        headings[number - 1].split(": ", 1)[1].rstrip(".").lower()
        for headings in (COD_HEADINGS, COT_HEADINGS)
        if number <= len(headings)
    )
    for number in range(1, 6)
}


class FormatError(UserError):
    """A text that does not have the response format it should have; the message says what is missing."""


def render_steps(headings: tuple[str, ...], texts: list[str]) -> str:
    """Headings and their texts as one response.

    Raises:
        FormatError: the number of texts differs from the number of headings, or a text is empty.
    """
    if len(texts) != len(headings):
        raise FormatError(f"{len(headings)} steps are needed, {len(texts)} were given")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise FormatError(f"step {number} is empty")
    return "\n\n".join(f"{heading}\n{text.strip()}" for heading, text in zip(headings, texts, strict=True))


def parse_steps(response: str) -> dict[int, str]:
    """Step number -> text of that step, headings removed, in order of appearance.

    The heading ends with its line, or, when the text follows on the same line, after the first sentence that belongs
    to a known heading. Steps that are absent are absent from the result; no step at all gives {}.
    """
    return {number: strip_heading(number, body) for number, body in step_bodies(response).items()}


def step_bodies(response: str) -> dict[int, str]:
    """Step number -> what follows "Step N:" up to the next step; the first of a number counts."""
    _, *parts = STEP_LINE.split(f"\n{response}")  # number, what follows it, number, ...
    bodies: dict[int, str] = {}
    for number, body in zip(parts[0::2], parts[1::2], strict=True):
        bodies.setdefault(int(number), body)
    return bodies


def strip_heading(number: int, body: str) -> str:
    """The text of a step without what is left of its heading line."""
    text = body.lstrip(" \t*_")
    for title in TITLES.get(number, ()):
        if text[: len(title)].lower() == title:
            return text[len(title) :].lstrip(".:*_ \t").strip()
    first, newline, rest = text.partition("\n")
    return rest.strip() if newline and rest.strip() else first.strip(" *_")


def check_steps(response: str, count: int) -> list[str]:
    """The `count` step texts of a complete response. Raises FormatError naming the missing or empty step."""
    steps = parse_steps(response)
    for number in range(1, count + 1):
        if not steps.get(number):
            raise FormatError(f"step {number} of {count} is {'empty' if number in steps else 'missing'}")
    return [steps[number] for number in range(1, count + 1)]


def final_description(response: str) -> str:
    """The text by which captions are compared: step 5, else step 1 and what follows, else everything (paper, step 3)."""
    bodies = step_bodies(response)
    if last := strip_heading(5, bodies.get(5, "")):
        return last
    if bodies:
        return "\n\n".join(text for text in parse_steps(response).values() if text)
    return response.strip()


def final_answer(response: str) -> str:
    """The text by which reasoning responses are compared: step 4, else the last line that is no heading; "The answer is" removed."""
    text = strip_heading(4, step_bodies(response).get(4, ""))
    if not text:
        said = [line for line in response.split("\n") if line.strip() and not STEP_LINE.match(f"\n{line}")]
        text = (said or [""])[-1]
    return re.sub(r"^(so,? |therefore,? )?the (final )?answer is:?\s*", "", text.strip(), flags=re.IGNORECASE)


def tags_to_steps(tagged: str) -> list[str]:
    """The contents of LLaVA-CoT's four tags. Raises FormatError naming the tag that is missing, empty or unclosed."""
    texts = []
    for tag in COT_TAGS:
        match = re.search(rf"<{tag}>(.*?)</{tag}>", tagged, re.DOTALL)
        if match is None:
            raise FormatError(f"<{tag}>...</{tag}> is missing or not closed")
        if not match.group(1).strip():
            raise FormatError(f"<{tag}> is empty")
        texts.append(match.group(1).strip())
    return texts


def without_image(text: str) -> str:
    """A message without its image placeholders."""
    return re.sub(r"\s*<image>\s*", " ", text).strip()


def with_image(text: str, images: int = 1) -> str:
    """A message with `images` placeholders in front, each on a line of its own."""
    return f"{IMAGE}\n" * images + without_image(text)


def ask_for_steps(question: str) -> str:
    """A question that asks for structured reasoning: the short-answer instruction is replaced, else one is appended."""
    if ANSWER_STEPS in question:
        return question
    if ANSWER_SHORT in question:
        return question.replace(ANSWER_SHORT, ANSWER_STEPS)
    return f"{question.rstrip()} {ANSWER_STEPS}"


def caption_instruction(style: str, question: str) -> str:
    """What a model is asked in order to caption an image, without placeholder.

    Args:
        style: one of CAPTION_STYLES.
        question: the record's own first message, used by `cod-conv`.
    """
    if style == "cod-default":
        return COD_DEFAULT
    if style == "cod-conv":
        return without_image(question) + DESCRIBE_STEPS
    if style == "default":
        return CAPTION_DEFAULT
    raise UserError(f"PROMPT is {style!r}; captions know {', '.join(CAPTION_STYLES)}")


def reasoning_instruction(style: str, question: str) -> str:
    """What a model is asked about an image, without placeholder; `cot-default` asks for steps, `default` does not."""
    question = without_image(question)
    if style == "cot-default":
        return ask_for_steps(question)
    if style == "default":
        return question.replace(ANSWER_STEPS, "").strip()
    raise UserError(f"PROMPT is {style!r}; reasoning knows {', '.join(REASONING_STYLES)}")


ANNOTATOR_SYSTEM = f"""You write careful image descriptions that will be used to teach a vision model.

You get an image, the question a user asked about it, and an existing description that may be incomplete or partly \
wrong. Look at the image first; use the existing description as a hint only.

Rules
- Cover everything that matters: objects, people, text, numbers, layout.
- Write only what can be seen. No guesses about mood, purpose or what lies outside the frame.
- Add outside knowledge only where it identifies what is visible (a landmark, a logo, a kind of document).
- Where the image contradicts the existing description, follow the image.

Answer in exactly five steps. Keep each heading as written, then a line break, then your text. Steps 1 to 4 take one \
or two sentences each, step 5 one or two paragraphs.

{COD_HEADINGS[0]}
{COD_HEADINGS[1]}
{COD_HEADINGS[2]}
{COD_HEADINGS[3]}
{COD_HEADINGS[4]}

Example, for a photographed bus timetable
{COD_HEADINGS[0]}
A printed timetable of bus line 12 behind a scratched plastic cover.

{COD_HEADINGS[1]}
The heading reads "12 Harbour - Station" in white on green. Two columns list departures from 6:05 to 23:35; the \
entries after 20:00 are marked with a small moon.

{COD_HEADINGS[2]}
The weekday column is left of the Sunday column, and the moon is explained in a line below both.

{COD_HEADINGS[3]}
A sticker covers the lower right corner, and a street lamp is reflected in the cover.

{COD_HEADINGS[4]}
The photo shows a timetable of bus line 12 from Harbour to Station, mounted behind a scratched plastic cover. A green \
heading names the line. Below it, weekday departures stand left of Sunday departures, from 6:05 to 23:35; departures \
after 20:00 carry a moon that a line at the bottom explains. A sticker hides the lower right corner, and the cover \
reflects a street lamp."""


def annotator_request(question: str, caption: str) -> str:
    """The text that goes to the annotator beside the image."""
    return f"Question: {without_image(question)}\n\nExisting description: {caption.strip()}"
