"""Benchmarks in VLMEvalKit's TSV format, answered greedily and scored by exact match.

    reads   <name>.tsv: `index`, `image` (base64, a list of base64, or another row's index) or `image_path`,
            `question`, options `A`.., `answer`, optional `hint`, `category`
    writes  predictions/<name>.jsonl (one line per question, resumable), results.json (accuracy, 95% interval, counts)

A row with options is multiple choice, a yes/no answer is a judgement, the rest are short answers.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.eval.questions import Row, images_of_row, is_judgement, options_of, question_text, read_tsv
from llava.prompts import final_answer
from llava.records import RecordAppender, read_jsonl, write_json
from llava.runs import open_run


def is_correct(row: Row, prediction: str) -> bool:
    """Exact match by kind of question.

    Multiple choice: the first word is the letter, or the text is the option's. Judgement: exactly one of yes and no
    occurs. Short answer: equal but for case, articles and punctuation at the ends.
    """
    text = final_answer(prediction)
    options = options_of(row)
    if options:
        return chosen_letter(text, options) == row["answer"].strip()
    if is_judgement(row):
        words = set(re.findall(r"[a-z]+", text.lower())) & {"yes", "no"}
        return words == {row["answer"].strip().lower()}
    return plain(text) == plain(row["answer"])


def chosen_letter(text: str, options: dict[str, str]) -> str | None:
    match = re.match(r"^\(?([A-I])\)?(?:[\s.:,)]|$)", text.strip())
    if match and match.group(1) in options:
        return match.group(1)
    return next((letter for letter, option in options.items() if plain(option) == plain(text)), None)


def plain(text: str) -> str:
    """A short answer without case, punctuation at its ends, articles before a word, and extra blanks."""
    text = re.sub(r"\s+", " ", text.lower()).strip(" .,:;!?\"'()*")
    return re.sub(r"\b(a|an|the) (?=\S)", "", text)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval).

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.49, 0.943]
    """
    z = 1.959964
    share, spread = correct / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def predict(path: Path, rows: list[Row], output: Path, model, processor, batch_size: int, max_new_tokens: int) -> None:
    """Answer what `output` does not hold yet; greedy."""
    from tqdm import tqdm

    from llava.generate.candidates import Draw, Prompt, Sampling
    from llava.generate.sampling import complete
    from llava.prompts import with_image

    done = {row["index"] for row in read_jsonl(output)}
    by_index = {row["index"]: row for row in rows}
    todo = [row for row in rows if row["index"] not in done]
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    with (
        RecordAppender(output) as predictions,
        tqdm(total=len(rows), initial=len(done), desc=path.stem, unit="question") as bar,
    ):
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            prompts = []
            for row in batch:
                images = images_of_row(row, by_index, path.parent)
                prompts.append(Prompt(images, [with_image(question_text(row), len(images))], [Draw(0, 0)]))
            for row, [completion] in zip(batch, complete(model, processor, prompts, sampling), strict=True):
                answered = {"index": row["index"], "prediction": completion.text, "answer": row["answer"]}
                correct = is_correct(row, completion.text)
                predictions.append({**answered, "correct": correct, "category": row.get("category", "")})
            bar.update(len(batch))


def summary(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    correct, total = sum(row["correct"] for row in predictions), len(predictions)
    low, high = wilson(correct, total)
    return {"questions": total, "correct": correct, "accuracy": correct / total, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder")
    parser.add_argument("--data_path", required=True, help="TSV files, comma-separated, or a folder of them")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--dry_run", action="store_true", help="read the questions, answer nothing")
    arguments = parser.parse_args()

    data = Path(arguments.data_path)
    paths = sorted(data.glob("*.tsv")) if data.is_dir() else [Path(name) for name in arguments.data_path.split(",")]
    if not paths:
        raise UserError(f"{data} holds no .tsv file. Fix: set DATA_PATH to VLMEvalKit TSV files")
    benchmarks = {path: read_tsv(path) for path in paths}
    if arguments.dry_run:
        from llava.model.load import check_checkpoint

        check_checkpoint(arguments.model_name_or_path)
        for path, rows in benchmarks.items():
            print(f"{path.stem:12} {len(rows):,} questions, first: {question_text(rows[0])!r}")
        print(f"writes       {arguments.output_dir}/results.json (nothing was written)")
        return
    identity = {
        "model": arguments.model_name_or_path,
        "data": list(map(str, paths)),
        "max_new_tokens": arguments.max_new_tokens,
    }
    with open_run(arguments.output_dir, "evaluate", identity, [arguments.model_name_or_path, *paths]) as run:
        output = run.folder / "results.json"
        if run.complete:
            print(f"[evaluate] already complete -> {output}")
            return
        import torch

        from llava.model.load import load_model, load_processor

        cuda = torch.cuda.is_available()
        processor = load_processor(arguments.model_name_or_path)
        model = load_model(arguments.model_name_or_path, dtype=torch.bfloat16 if cuda else torch.float32)
        model.to("cuda" if cuda else "cpu").eval()
        results = {}
        for path, rows in benchmarks.items():
            predictions = run.folder / "predictions" / f"{path.stem}.jsonl"
            predict(path, rows, predictions, model, processor, arguments.batch_size, arguments.max_new_tokens)
            results[path.stem] = summary(list(read_jsonl(predictions)))
        write_json(output, {"model": arguments.model_name_or_path, "benchmarks": results})
        run.finish(output, benchmarks=len(results), questions=sum(result["questions"] for result in results.values()))


if __name__ == "__main__":
    run_command(main)
