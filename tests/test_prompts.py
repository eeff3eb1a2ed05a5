"""Prompts and the parsers that read their answers back."""

import pytest

from llava.errors import UserError
from llava.prompts import (
    ANNOTATOR_SYSTEM,
    COD_HEADINGS,
    COT_HEADINGS,
    FormatError,
    annotator_request,
    ask_for_steps,
    caption_instruction,
    check_steps,
    final_answer,
    final_description,
    parse_steps,
    reasoning_instruction,
    render_steps,
    tags_to_steps,
    with_image,
    without_image,
)

COD_TEXTS = [
    "A dog and a ball.",
    "The dog is brown; the ball is red: size 5.",
    "The dog is left of the ball.\n\nIt looks at it.",
    "A fence, far away.",
    "A brown dog sits left of a red ball.\n\nBehind both is a fence.\nThe sky is grey.",
]
COT_TEXTS = ["Count the dogs.", "Two dogs are seen.", "One and one\n\nmake two.", "2"]
TAGGED = (
    "<SUMMARY> Count the dogs. </SUMMARY>\n\n<CAPTION>Two dogs.\nOne cat.</CAPTION>\n\n"
    "<REASONING> 1 + 1 < 3, so 2. </REASONING>\n\n<CONCLUSION> 2 </CONCLUSION>"
)


# Steps


@pytest.mark.parametrize(("headings", "texts"), [(COD_HEADINGS, COD_TEXTS), (COT_HEADINGS, COT_TEXTS)])
def test_what_is_rendered_is_parsed_back(headings, texts):
    response = render_steps(headings, texts)
    assert parse_steps(response) == dict(enumerate(texts, 1))
    assert check_steps(response, len(headings)) == texts


def test_the_rendered_layout_is_heading_text_blank_line():
    assert render_steps(COT_HEADINGS, ["a", " b\n", "c", "d"]) == (
        "Step 1: Clarify the task objective.\na\n\n"
        "Step 2: Extract the crucial visual information from the image.\nb\n\n"
        "Step 3: Generate detailed reasoning to solve the task.\nc\n\n"
        "Step 4: Conclude the task with an answer.\nd"
    )


def test_rendering_wants_one_text_for_each_heading_and_none_empty():
    with pytest.raises(FormatError, match="4 steps are needed, 3 were given"):
        render_steps(COT_HEADINGS, ["a", "b", "c"])
    with pytest.raises(FormatError, match="step 2 is empty"):
        render_steps(COT_HEADINGS, ["a", " \n", "c", "d"])


def bold_headings(response: str) -> str:
    for heading in COD_HEADINGS:
        response = response.replace(heading, f"**{heading}**")
    return response


def bold_numbers(response: str) -> str:
    for number in range(1, 6):
        response = response.replace(f"Step {number}:", f"**Step {number}**:")
    return response


def bold_numbers_with_colon(response: str) -> str:
    for number in range(1, 6):
        response = response.replace(f"Step {number}:", f"**Step {number}:**")
    return response


def markdown_headings(response: str) -> str:
    return response.replace("Step ", "### Step ")


def blank_line_after_headings(response: str) -> str:
    for heading in COD_HEADINGS:
        response = response.replace(heading, heading + "\n")
    return response


def windows_line_ends(response: str) -> str:
    return response.replace("\n\nStep", "\r\n\r\nStep")


def text_on_the_heading_line(response: str) -> str:
    for heading in COD_HEADINGS:
        response = response.replace(heading + "\n", heading + " ")
    return response


def headings_without_full_stop(response: str) -> str:
    for heading in COD_HEADINGS:
        response = response.replace(heading, heading.rstrip("."))
    return response


@pytest.mark.parametrize(
    "vary",
    [
        bold_headings,
        bold_numbers,
        bold_numbers_with_colon,
        markdown_headings,
        blank_line_after_headings,
        windows_line_ends,
        text_on_the_heading_line,
        headings_without_full_stop,
        str.lower,
    ],
)
def test_variants_that_annotators_write_are_parsed_alike(vary):
    response = vary(render_steps(COD_HEADINGS, COD_TEXTS))
    assert response != render_steps(COD_HEADINGS, COD_TEXTS)
    expected = [text.lower() for text in COD_TEXTS] if vary is str.lower else COD_TEXTS
    assert check_steps(response, 5) == expected


def test_an_introduction_is_no_step_and_own_headings_are_dropped():
    response = "Let me think.\n\nStep 1: Look\nA dog.\n\nStep 2: Details\nIt is brown.\n"
    assert parse_steps(response) == {1: "A dog.", 2: "It is brown."}


def test_a_step_number_inside_a_sentence_is_no_heading():
    assert parse_steps("Step 1: Look\nSee Step 2: below.") == {1: "See Step 2: below."}


def test_a_step_that_comes_twice_keeps_its_first_text():
    assert parse_steps("Step 1: Look\nA dog.\nStep 2: More\nA ball.\nStep 1: Look\nA cat.") == {
        1: "A dog.",
        2: "A ball.",
    }


def test_text_without_steps_has_none():
    assert parse_steps("A dog.") == {}
    assert parse_steps("") == {}


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_missing_step_is_named(number):
    parts = [f"{heading}\n{text}" for heading, text in zip(COD_HEADINGS, COD_TEXTS, strict=True)]
    del parts[number - 1]
    with pytest.raises(FormatError, match=f"step {number} of 5 is missing"):
        check_steps("\n\n".join(parts), 5)


def test_a_chain_cut_off_inside_a_step_heading_or_text():
    whole = render_steps(COD_HEADINGS, COD_TEXTS)
    for cut, problem in [
        (whole.index("Step 4"), "step 4 of 5 is missing"),
        (whole.index("Step 5") + len("Step 5"), "step 5 of 5 is missing"),
        (whole.index("Step 5") + len(COD_HEADINGS[4]), "step 5 of 5 is empty"),
    ]:
        with pytest.raises(FormatError, match=problem):
            check_steps(whole[:cut], 5)
    cut_in_step_five = check_steps(whole[: whole.index("Behind both")], 5)
    assert cut_in_step_five == [*COD_TEXTS[:4], "A brown dog sits left of a red ball."]


# What is compared


def test_descriptions_are_compared_by_step_five_with_all_its_paragraphs():
    assert final_description(render_steps(COD_HEADINGS, COD_TEXTS)) == COD_TEXTS[4]
    assert final_description(bold_headings(render_steps(COD_HEADINGS, COD_TEXTS))) == COD_TEXTS[4]


def test_a_chain_without_step_five_is_compared_by_the_steps_it_has():
    truncated = render_steps(COD_HEADINGS, COD_TEXTS)
    truncated = truncated[: truncated.index("Step 4")]
    assert final_description(truncated) == "\n\n".join(COD_TEXTS[:3])


def test_a_description_without_steps_is_compared_whole():
    assert final_description("  A dog.\n\nA ball.\n") == "A dog.\n\nA ball."


def test_reasoning_is_compared_by_step_four():
    assert final_answer(render_steps(COT_HEADINGS, COT_TEXTS)) == "2"
    assert final_answer("**Step 4: Conclude the task with an answer.**\nTwo dogs") == "Two dogs"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("I see one.\nAnd another.\n\n2\n \n", "2"),
        ("I see two.\nThe answer is 2", "2"),
        ("I see two.\nThe answer is: 2", "2"),
        ("So, the final answer is B.", "B."),
        ("Therefore the answer is yes", "yes"),
        ("2", "2"),
        ("", ""),
        ("Step 4: Conclude the task with an answer.\nThe answer is 7", "7"),
    ],
)
def test_answers_without_steps_are_the_last_line(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize("cut", ["Step 4:", "Step 4: Conclude the task with an answer.\n"])
def test_reasoning_cut_off_before_its_answer_does_not_answer_with_the_heading(cut):
    whole = render_steps(COT_HEADINGS, COT_TEXTS)
    response = whole[: whole.index("Step 4")] + cut
    assert "Step 4" not in final_answer(response)
    assert "Conclude" not in final_answer(response)


# LLaVA-CoT's tags


def test_tags_become_four_texts():
    assert tags_to_steps(TAGGED) == ["Count the dogs.", "Two dogs.\nOne cat.", "1 + 1 < 3, so 2.", "2"]


@pytest.mark.parametrize("tag", ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"])
def test_a_missing_unclosed_or_empty_tag_is_named(tag):
    begin, end = TAGGED.index(f"<{tag}>"), TAGGED.index(f"</{tag}>") + len(f"</{tag}>")
    with pytest.raises(FormatError, match=f"<{tag}>...</{tag}> is missing or not closed"):
        tags_to_steps(TAGGED[:begin] + TAGGED[end:])
    with pytest.raises(FormatError, match=f"<{tag}>...</{tag}> is missing or not closed"):
        tags_to_steps(TAGGED.replace(f"</{tag}>", ""))
    with pytest.raises(FormatError, match=f"<{tag}> is empty"):
        tags_to_steps(TAGGED[:begin] + f"<{tag}> \n </{tag}>" + TAGGED[end:])


# Placeholders and instructions


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("Look at <image> please", "Look at please"),
        ("<image>\n<image>\nCompare", "Compare"),
        ("Line one\nline two", "Line one\nline two"),
        ("<image>", ""),
    ],
)
def test_without_image(text, bare):
    assert without_image(text) == bare


def test_with_image_puts_exactly_as_many_placeholders_in_front():
    assert with_image("What?") == "<image>\nWhat?"
    assert with_image("What?\n<image>") == "<image>\nWhat?"
    assert with_image("<image> What?", 2) == "<image>\n<image>\nWhat?"
    assert with_image("<image>\nWhat?", 0) == "What?"


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        (
            "How many? Answer the question using a single word or phrase.",
            "How many? Answer the question step-by-step.",
        ),
        ("How many?", "How many? Answer the question step-by-step."),
        ("How many?\n", "How many? Answer the question step-by-step."),
        ("How many? Answer the question step-by-step.", "How many? Answer the question step-by-step."),
    ],
)
def test_asking_for_steps(question, asked):
    assert ask_for_steps(question) == asked
    assert ask_for_steps(asked) == asked


@pytest.mark.parametrize(
    ("style", "instruction"),
    [
        ("cod-default", "Please generate a detailed caption of this image. Describe the image step-by-step."),
        ("cod-conv", "What do you see? Describe the image step-by-step."),
        ("default", "Please generate a detailed caption of this image. Be as descriptive as possible."),
    ],
)
def test_caption_instructions(style, instruction):
    assert caption_instruction(style, "<image>\nWhat do you see?") == instruction


@pytest.mark.parametrize(
    ("style", "question", "instruction"),
    [
        ("cot-default", "<image>\nHow many?", "How many? Answer the question step-by-step."),
        ("default", "<image>\nHow many?", "How many?"),
        ("default", "<image>\nHow many? Answer the question step-by-step.", "How many?"),
    ],
)
def test_reasoning_instructions(style, question, instruction):
    assert reasoning_instruction(style, question) == instruction


def test_unknown_styles_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'cot-default'; captions know cod-default, cod-conv, default"):
        caption_instruction("cot-default", "q")
    with pytest.raises(UserError, match="'cod-conv'; reasoning knows cot-default, default"):
        reasoning_instruction("cod-conv", "q")


def test_the_annotator_is_told_the_very_headings_that_the_parser_knows():
    example = ANNOTATOR_SYSTEM[ANNOTATOR_SYSTEM.index("Example, ") :]
    assert all(heading in ANNOTATOR_SYSTEM[: ANNOTATOR_SYSTEM.index("Example, ")] for heading in COD_HEADINGS)
    assert check_steps(example, 5)[0] == "A printed timetable of bus line 12 behind a scratched plastic cover."


def test_the_annotator_gets_question_and_hint_without_placeholder():
    request = annotator_request("<image>\nWhat is it?", " A bus. \n")
    assert request == "Question: What is it?\n\nExisting description: A bus."
