"""Every scoring rule on cases worked out by hand; `test_vlmevalkit_agreement.py` compares whole benchmarks."""

import pytest

from llava.eval.scoring import (
    as_number,
    chosen_letter,
    edit_distance,
    mark_anls,
    mark_choice,
    mark_math,
    mark_parts,
    mark_relaxed,
    mark_same,
    mark_short,
    mark_substring,
    mark_vqa,
    mark_yes_no,
    normal,
    rule_for,
    without_punctuation,
)

OPTIONS = {"A": "blue square", "B": "red circle", "C": "yellow ring"}


def row(answer: str, **more: str) -> dict[str, str]:
    return {"index": "0", "question": "What is it?", "answer": answer, **more}


@pytest.mark.parametrize(
    "said",
    ["B", "(B)", "B.", "B)", " B ", "B: red circle", "B. red circle", "B, I think", "red circle", "Red circle.", "**B**",
     "The answer is (B).", "I see a circle.\nB", "It is a red circle", "Step 4: Conclude the task with an answer.\nB"],
)  # fmt: skip
def test_forms_of_the_right_letter(said):
    assert mark_choice(row("B", **OPTIONS), said) == ("B", 1)
    assert mark_choice(row("A", **OPTIONS), said) == ("B", 0)


@pytest.mark.parametrize("said", ["", "b", "D", "BA", "Blue", "C or B", "a red circle and a blue square", "circle"])
def test_what_names_no_option_or_several_is_left_to_a_judge(said):
    assert mark_choice(row("B", **OPTIONS), said) == ("", None)


def test_a_letter_counts_among_the_last_four_words_only():
    assert (
        chosen_letter("A is what one can see", OPTIONS) is None
    )  # 6 words: A is the first, the last four begin at the third
    assert chosen_letter("A is seen here", OPTIONS) == "A"
    assert chosen_letter("one can see that it is B", OPTIONS) == "B"


def test_a_text_counts_when_the_answer_is_not_over_twice_as_long_as_all_options():
    options = {"A": "cat", "B": "dog"}  # six letters: at most twelve
    assert chosen_letter("it is a dog.", options) == "B"
    assert chosen_letter("it is a dog..", options) is None


def test_a_refusal_is_an_answer_and_a_wrong_one():
    assert chosen_letter("Cannot determine the answer", OPTIONS) == "Z"
    assert mark_choice(row("B", **OPTIONS), "Z") == ("Z", 0)


@pytest.mark.parametrize(
    ("said", "understood"),
    [("Yes", "Yes"), ("no.", "No"), ("Yes, there is a dog", "Yes"), ("There is none, so no", "No"), ("yes and no", ""),
     ("Not sure", ""), ("Nothing known", ""), ("", ""), ("yes/no", ""), ("No-one is there", "No"), ("Answer:yes", ""),
     ("I see a dog.\nThe answer is yes.", "Yes")],
)  # fmt: skip
def test_a_judgement_needs_exactly_one_of_the_two_words(said, understood):
    for answer in ("Yes", "No"):
        mark = float(understood == answer) if understood else None
        assert mark_yes_no(row(answer), said) == (understood, mark)


@pytest.mark.parametrize(
    ("answer", "said", "mark"),
    [("3", "3", 1), ("3", "3.", 0), ("3", "three", 1), ("3", "13", 0), ("3", "3 or 4", 0), ("top left", "The Top  Left.", 1),
     ("top left", "left top", 0), ("the red ring", "red ring", 1), ("3", "", 0), ("isn't", "isnt", 1), ("0", "none", 1),
     ("['cat', 'a cat', 'dog', 'Cat!']", "cat", 0.75)],
)  # fmt: skip
def test_short_answers(answer, said, mark):
    assert mark_short(row(answer), said)[1] == mark


def test_an_empty_list_is_the_answer_itself():
    assert mark_short(row("[]"), "[]")[1] == 1
    assert mark_anls(row("[]"), "x")[1] == 0


def test_normal_by_hand():
    assert normal("The Dog's two, red\tballs.") == "dog's 2 red balls"
    assert without_punctuation("a-b") == "a b"
    assert without_punctuation("a- b") == "a b"  # beside a blank the mark vanishes
    assert without_punctuation("1,000-b") == "1000b"  # a grouped number: all marks vanish
    assert without_punctuation("3.5 m. x.y") == "3.5 m xy"


def test_vqa_accuracy_by_hand():
    # ten people: cat 2, dog 4, fox 4. "cat": the two who said it see one other (1/3), the eight others two (2/3)
    people = str(["cat"] * 2 + ["dog"] * 4 + ["fox"] * 4)
    assert mark_vqa(row(people), "cat")[1] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert mark_vqa(row(people), "a dog")[1] == pytest.approx(
        1.0
    )  # four see three others, six see four: all at least 3
    assert mark_vqa(row(people), "cow")[1] == 0


def test_relaxed_accuracy_by_hand():
    assert [mark_relaxed(row("100"), said)[1] for said in ("100", "105", "95", "105.1", "94.9", "a")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert mark_relaxed(row("50%"), "0.5")[1] == 1
    assert mark_relaxed(row("0"), "0.0")[1] == 0  # nothing is within 5 % of nothing: compared as text
    assert mark_relaxed(row("['Yes', '7']"), "yes")[1] == 1
    assert (as_number("12%"), as_number("x")) == (0.12, None)


def test_anls_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert mark_anls(row("kitten"), "sitting")[1] == pytest.approx(1 - 3 / 7)
    assert mark_anls(row("abcd"), "abxy")[1] == 0.5
    assert mark_anls(row("abcd"), "axyz")[1] == 0  # 0.25 is below a half
    assert mark_anls(row("['abcd', 'Hello']"), " hello")[1] == 1
    assert mark_anls(row("abcd"), "")[1] == 0


def test_exact_answers_need_the_same_words():
    assert mark_same(row("['Jane Austen']"), " jane austen ")[1] == 1
    assert mark_same(row("Jane Austen"), "Jane  Austen")[1] == 0


def test_the_substring_rule_of_ocrbench():
    assert mark_substring(row("['STOP', 'halt']"), "The sign says stop.")[1] == 1
    assert mark_substring(row("['STOP']"), "st op")[1] == 0
    formula = {"category": "Handwritten Mathematical Expression Recognition"}
    assert mark_substring(row("['x ^ 2']", **formula), "y = x^2")[1] == 1
    assert mark_substring(row("['x ^ 2']", **formula), "y = X^2")[1] == 0


def test_mathvista_without_a_judge():
    assert mark_math(row("14", answer_type="integer"), "14") == ("14", 1)
    assert mark_math(row("14", answer_type="integer"), "15") == ("15", 0)
    assert mark_math(row("14", answer_type="integer"), "It is 14")[1] is None
    assert mark_math(row("1.50", answer_type="float"), "1.5")[1] == 1
    choice = {"question_type": "multi_choice", "choices": "['3/11', '8/11']", "answer_option": "B"}
    assert mark_math(row("8/11", **choice), "The answer is (B) 8/11")[1] == 1
    assert mark_math(row("8/11", **choice), "3/11")[1] == 0
    assert mark_math(row("[1, 2]", answer_type="list"), "[1, 2]")[1] == 0


def test_mmvet_without_a_judge_counts_parts():
    assert mark_parts(row("-1<AND>-5"), "x = -1")[1] == 0.5
    assert mark_parts(row("ring <OR> band <AND> gold"), "A golden band")[1] == 1


@pytest.mark.parametrize(
    ("name", "rows", "total", "judge"),
    [("POPE", [row("Yes")], "f1", "choose"), ("MME", [row("No")], "mme", "choose"),
     ("MMBench_DEV_EN", [row("A", **OPTIONS)], "circular", "choose"), ("MMStar", [row("A", **OPTIONS)], "mean", "choose"),
     ("MME-RealWorld", [row("A", **OPTIONS)], "mean", "choose"), ("OCRBench", [row("['x']")], "ocrbench", None),
     ("DocVQA_VAL", [row("['x']")], "mean", None), ("MMVet", [row("x")], "mean", "grade"),
     ("ChartQAPro", [row("x")], "mean", None), ("MathVista_MINI", [row("x")], "mean", "extract"), ("COCO_VAL", [row("['a dog']")], "cider", None),
     ("Own", [row("Yes"), row("no")], "mean", "choose"), ("Own", [row("x"), row("no")], "mean", None)],
)  # fmt: skip
def test_the_rule_follows_the_name_then_the_questions(name, rows, total, judge):
    rule = rule_for(name, rows)
    assert (rule.total, rule.judge) == (total, judge)
