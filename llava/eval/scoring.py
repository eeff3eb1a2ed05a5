"""How one answer is marked: the exact rules of VLMEvalKit, so that its number and ours agree on the same predictions.

Each rule is a pure function of the question's row and the model's answer and gives what was understood and a mark from 0
to 1. `rule_for` says which rule a benchmark has, and how its marks become its number (`llava.eval.totals`).

An answer in steps is reduced to its conclusion first. VLMEvalKit reads the words `None`, `NA` and `null` in a TSV as
empty; here an option with that text stays an option.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from llava.eval.questions import Row, is_judgement, options_of
from llava.prompts import final_answer, final_description, parse_steps

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}  # fmt: skip
CONTRACTED = [
    "'ow's'at",
    "'twas",
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "somebodyd",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = (
    {  # a word that lacks one apostrophe -> the word
        word[:place] + word[place + 1 :]: word for word in CONTRACTED for place, mark in enumerate(word) if mark == "'"
    }
    | {"somebody'd": "somebodyd"}
)
Mark = tuple[str, float | None]  # what was understood, and 0 to 1; None where only a judge could tell


@dataclass(frozen=True)
class Rule:
    """How a benchmark is scored.

    Attributes:
        mark: marks one answer.
        total: name of the way from marks to the number, see `llava.eval.totals.TOTALS`.
        judge: what a judge is asked where there is one: `choose`, `grade` or `extract`; None: it has nothing to say.
        label: what the score is to be called when no judge has been asked.
        short: whether the model is told to answer open questions with a word or phrase.
    """

    mark: Callable[[Row, str], Mark]
    total: str
    judge: str | None = None
    label: str = "exact match"
    short: bool = True


def rule_for(name: str, rows: list[Row]) -> Rule:
    """The rule of a benchmark by its name, as VLMEvalKit names it (MMBench_DEV_EN, POPE, ...), else by its questions."""
    lower = name.lower()
    for pattern, rule in RULES.items():
        if re.fullmatch(pattern, lower):
            return rule
    if any(options_of(row) for row in rows):
        circular = any(part in lower for part in ("mmbench", "ccbench", "circular", "mmcr"))
        return Rule(mark_any, "circular" if circular else "mean", "choose")
    if all(is_judgement(row) for row in rows):
        return Rule(mark_yes_no, "mean", "choose")
    return Rule(mark_any, "mean")


def conclusion(answer: str) -> str:
    """The answer, or what an answer in steps concludes."""
    return final_answer(answer) if parse_steps(answer) else answer


def answers_of(row: Row) -> list[str]:
    """The accepted answers: `answer` holds one, or a list written as Python writes it."""
    if row["answer"].lstrip().startswith("["):
        try:
            return [str(item) for item in ast.literal_eval(row["answer"].strip())] or [row["answer"]]
        except (SyntaxError, ValueError):
            pass  # an answer that begins with a bracket
    return [row["answer"]]


def mark_any(row: Row, answer: str) -> Mark:
    """By kind of question: options, yes or no, or a short answer."""
    if options_of(row):
        return mark_choice(row, answer)
    return mark_yes_no(row, answer) if is_judgement(row) else mark_short(row, answer)


def mark_choice(row: Row, answer: str) -> Mark:
    letter = chosen_letter(conclusion(answer), options_of(row))
    return (letter or ""), (float(letter == row["answer"].strip()) if letter else None)


def chosen_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option an answer names, by its letter or its text; `Z` for a refusal; None when it names none or several.

    A letter counts when it is the only one and among the answer's last four words; a text when it is the only option's
    that occurs and the answer is not over twice as long as all options.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in lower]
    return found[0] if len(found) == 1 else None


def mark_yes_no(row: Row, answer: str) -> Mark:
    """Yes or No when exactly one of the two words occurs."""
    words = without_punctuation(conclusion(answer).lower()).split()
    if ("yes" in words) == ("no" in words):
        return "", None
    said = "Yes" if "yes" in words else "No"
    return said, float(said.lower() == row["answer"].strip().lower())


def mark_short(row: Row, answer: str) -> Mark:
    """Share of the accepted answers that equal this one after `normal`: 1 or 0 where there is one."""
    said, accepted = normal(conclusion(answer)), [normal(item) for item in answers_of(row)]
    return said, accepted.count(said) / len(accepted)


def mark_vqa(row: Row, answer: str) -> Mark:
    """VQA accuracy (TextVQA): over the people asked, a third for each of the others who said the same, at most 1."""
    said, accepted = normal(conclusion(answer)), [normal(item) for item in answers_of(row)]
    same = accepted.count(said)
    shares = [min(1.0, (same - (item == said)) / 3) for item in accepted]
    return said, sum(shares) / len(shares)


def mark_same(row: Row, answer: str) -> Mark:
    """Equal to an accepted answer but for case and blanks at the ends (GQA, OCRVQA)."""
    said = conclusion(answer).strip()
    return said, float(any(said.lower() == item.strip().lower() for item in answers_of(row)))


def mark_relaxed(row: Row, answer: str) -> Mark:
    """ChartQA: a number within 5 % of the right one, anything else equal but for case."""
    said = conclusion(answer).strip()
    return said, float(any(is_close(item, said) for item in answers_of(row)))


def is_close(right: str, said: str) -> bool:
    wanted, given = as_number(right), as_number(said)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= 0.05
    return said.lower() == right.lower()


def as_number(text: str) -> float | None:
    """A number, or a share where it ends in a percent sign."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mark_anls(row: Row, answer: str) -> Mark:
    """DocVQA, InfoVQA: similarity by edit distance to the nearest accepted answer; below a half it is nothing."""
    said = conclusion(answer)
    nearest = max(similarity(item, said) for item in answers_of(row))
    return said, nearest if nearest >= 0.5 else 0.0


def similarity(right: str, said: str) -> float:
    """1 - edit distance / length of the longer text; the distance is taken without case and extra blanks."""
    longer = max(len(right), len(said))
    if not longer:
        return 1.0
    return 1 - edit_distance(" ".join(right.lower().split()), " ".join(said.lower().split())) / longer


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance: fewest letters put in, taken out or exchanged."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            changed = diagonal + (letter != wanted)
            diagonal, row[place] = row[place], min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def mark_substring(row: Row, answer: str) -> Mark:
    """OCRBench: an accepted answer occurs in what was said; formulas are compared without blanks and with case."""
    said = conclusion(answer).strip().replace("\n", " ")
    accepted = [item.strip().replace("\n", " ") for item in answers_of(row)]
    if row.get("category") == "Handwritten Mathematical Expression Recognition":
        return said, float(any(item.replace(" ", "") in said.replace(" ", "") for item in accepted))
    return said, float(any(item.lower() in said.lower() for item in accepted))


def mark_math(row: Row, answer: str) -> Mark:
    """MathVista: the whole answer is the option, the whole number or the decimal number asked for; else None.

    An answer of another type (a list) is never right in VLMEvalKit, and so neither here.
    """
    said = conclusion(answer).strip()
    if row.get("question_type") == "multi_choice":
        choices = dict(zip("ABCDEFGHIJKLMNOP", map(str, ast.literal_eval(row["choices"])), strict=False))
        letter = chosen_letter(said, choices)
        return (letter or ""), (float(letter == row["answer_option"]) if letter else None)
    kinds = {"integer": int, "float": float}
    if row.get("answer_type") not in kinds:
        return said, 0.0
    kind = kinds[row["answer_type"]]
    try:
        return str(kind(said)), float(kind(said) == kind(row["answer"]))
    except ValueError:
        return "", None


def mark_parts(row: Row, answer: str) -> Mark:
    """MMVet without a judge: share of the parts joined by <AND> of which an <OR> alternative occurs in the answer."""
    said = conclusion(answer).lower()
    parts = [[item.strip().lower() for item in part.split("<OR>")] for part in row["answer"].split("<AND>")]
    return said, sum(any(item in said for item in part) for part in parts) / len(parts)


def mark_caption(row: Row, answer: str) -> Mark:
    """A caption is scored with all others, see `llava.eval.cider`."""
    return final_description(answer), 0.0


def normal(text: str) -> str:
    """A short answer as VQA's evaluation compares it: no case, articles or punctuation, digits for numbers up to ten."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def without_punctuation(text: str) -> str:
    """Marks beside a blank vanish, marks between letters become blanks; in a text with 1,000 all vanish.

    Full stops vanish unless a digit is beside them; the first 32 of a text, as the original has it.
    """
    grouped = re.search(r"\d,\d", text)
    plain = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        vanishes = grouped or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if vanishes else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", plain, count=32)


RULES = {  # a pattern of a benchmark's whole name in lower case -> its rule
    "mme": Rule(mark_yes_no, "mme", "choose"),
    "ocrbench(_mini)?": Rule(mark_substring, "ocrbench", short=False),
    "ocrvqa.*": Rule(mark_same, "mean"),
    "mmvet(_hard)?": Rule(mark_parts, "mean", "grade", "parts found, no judge", short=False),
    "mathvista.*": Rule(mark_math, "mean", "extract", "whole answers, no judge", short=False),
    ".*pope": Rule(mark_yes_no, "f1", "choose"),
    "chartqa(_test)?": Rule(mark_relaxed, "mean"),
    "textvqa.*": Rule(mark_vqa, "mean"),
    "docvqa.*": Rule(mark_anls, "mean"),
    "infovqa.*": Rule(mark_anls, "mean"),
    "gqa.*": Rule(mark_same, "mean"),
    "coco.*": Rule(mark_caption, "cider", label="references", short=False),
}
METRICS = {  # `Rule.total` -> what the number is called

    "mean": "accuracy", "circular": "circular accuracy", "f1": "F1", "mme": "perception", "ocrbench": "score / 10",
    "cider": "CIDEr-D",
}  # fmt: skip
