"""A language model as a judge, where a benchmark needs one: it matches, extracts or grades answers.

    choose   which option (or yes, no) an answer means that names none exactly (multiple choice, POPE, MME)
    extract  the short answer a long one comes to (MathVista)
    grade    how much of the right answer is there, 0 to 1 (MMVet)

The prompts are our own, so that scores are near VLMEvalKit's but not equal to them; the judge's name, the date and the
prompt's hash are kept with the result. What has been judged is kept too and is not asked, or paid for, again.
"""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.eval.questions import Row, options_of
from llava.eval.scoring import Mark, Rule
from llava.records import RecordAppender, read_jsonl

TRIES = 3  # the later ones at a higher temperature
PROMPTS = {
    "choose": """You compare an answer with the options of a question. Reply with the one option the answer means, and \
nothing else: its letter, or Yes or No where there are no letters. Reply Z when the answer means none of them, means \
several, or refuses to answer. Do not solve the question yourself.

Question: {question}
Options: {options}
Answer: {answer}
Option:""",
    "extract": """You shorten an answer to its result. Reply with the final result alone, in the form the question asks \
for: an option's letter, a whole number, a decimal number with the digits asked for, or a list. No words, no unit. Reply \
None when the answer comes to no result. Do not solve the question yourself.

Question: {question}
Answer: {answer}
Result:""",
    "grade": """You grade an answer against the right one. <AND> joins parts that are all needed; <OR> separates parts \
of which one is enough. Reply with one number from 0.0 to 1.0 in steps of 0.1 and nothing else: 1.0 when everything \
that is needed is said correctly, 0.0 when nothing is, else the share that is. Wording does not matter; what contradicts \
the right answer counts as missing.

Question: {question}
Right answer: {right}
Answer: {answer}
Grade:""",
}


class Judge:
    """A judge at an endpoint.

    Args:
        model: the server's name for it.
        base_url: of the server; None for OPENAI_BASE_URL.
        folder: where its verdicts are kept, one file a benchmark.
    """

    def __init__(self, model: str, base_url: str | None, folder: Path, concurrency: int = 16):
        if not model:
            raise UserError("a judge needs a name. Fix: JUDGE=gpt-4o")
        self.model, self.base_url, self.folder, self.concurrency = model, base_url, folder, concurrency

    def marks(self, benchmark: str, rule: Rule, asked: list[tuple[Row, str]]) -> tuple[list[Mark], dict[str, Any]]:
        """Marks of these rows and answers, and who gave them: name, date, prompt, how many were understood.

        A reply that cannot be read after three tries marks nothing: 0 where a mark is needed.
        """
        from llava.endpoint import Endpoint, Refused, each

        task = rule.judge
        template = PROMPTS[task]
        prompt = hashlib.sha256(template.encode()).hexdigest()[:12]
        path = self.folder / f"{self.model.replace('/', '--')}-{prompt}" / f"{benchmark}.jsonl"
        verdicts = {(line["index"], line["answer"]): line for line in read_jsonl(path)}
        endpoint = Endpoint(self.base_url, self.model)
        todo = [(row, answer) for row, answer in asked if (row["index"], answer) not in verdicts]

        async def ask(job: tuple[Row, str]) -> dict[str, Any]:
            row, answer = job
            replies: list[str] = []
            for attempt in range(TRIES):
                try:
                    [reply] = await endpoint.ask(
                        [{"role": "user", "content": filled(template, row, answer)}],
                        temperature=0.5 * attempt, max_tokens=64,
                    )  # fmt: skip
                except Refused as error:
                    replies.append(f"refused: {error}")
                    continue
                replies.append(reply.text)
                if (mark := read_verdict(task, rule, row, reply.text))[1] is not None:
                    return {"mark": mark, "model": reply.model, "replies": replies}
            return {"mark": ("", None), "model": self.model, "replies": replies}

        with RecordAppender(path) as kept:

            def done(job: tuple[Row, str], verdict: dict[str, Any]) -> None:
                line = {
                    "index": job[0]["index"], "answer": job[1], **verdict, "date": time.strftime("%Y-%m-%d"),
                }  # fmt: skip
                verdicts[line["index"], line["answer"]] = line
                kept.append(line)

            each(todo, ask, done, self.concurrency)
        lines = [verdicts[row["index"], answer] for row, answer in asked]
        said_by = {
            "model": ", ".join(sorted({line["model"] for line in lines})) or self.model,
            "date": max((line["date"] for line in lines), default=time.strftime("%Y-%m-%d")),
            "prompt": prompt,
            "asked": len(lines),
            "not_understood": sum(line["mark"][1] is None for line in lines),
        }
        return [tuple(line["mark"]) for line in lines], said_by


def filled(template: str, row: Row, answer: str) -> str:
    options = ", ".join(f"{letter}. {text}" for letter, text in options_of(row).items()) or "Yes, No"
    values = {"question": row["question"], "options": options, "answer": answer, "right": row["answer"]}
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def read_verdict(task: str, rule: Rule, row: Row, reply: str) -> Mark:
    """A judge's reply as a mark: a grade as it is, anything else marked like an answer; `Z` and `None` are a 0."""
    if task == "grade":
        match = re.fullmatch(r"\s*(0(\.\d+)?|1(\.0+)?)\s*\.?\s*", reply)
        return (reply, float(match[1])) if match else (reply, None)
    if reply.strip(" .") in ("Z", "None"):
        return reply, 0.0
    return rule.mark(row, reply)
