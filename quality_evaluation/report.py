"""One HTML page about a run of the cycle, or about one curation: results, losses, what was kept and why. Opens offline.

reads   --work_dir: table.md, */loss.png, curated/*/scored.jsonl, run.json of every stage
        --curated: scored.jsonl and run.json of that folder
writes  <work_dir>/report.html or --output, self-contained; about 2 MB at most for any number of records
"""

import argparse
import base64
import difflib
import io
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.images import ImageError, find_image, load_image
from llava.prompts import without_image
from llava.records import Record, images_of, question_of, write_atomically
from quality_evaluation.charts import curve, histogram
from quality_evaluation.tally import BINS, Tally, tally

LONGEST = 6000  # characters of a text that the gallery shows
STYLE = """
:root { --line: #e5e7eb; --soft: #6b7280; --kept: #15803d; --dropped: #9ca3af; --bad: #dc2626; --ink: #1d4ed8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: #1f2937;
  overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h1 { margin: .5rem 0; } h2 { margin: 2.5rem 0 1rem; padding-top: 1rem;
  border-top: 2px solid var(--line); } h3 { margin: 2rem 0 .5rem; } p { max-width: 45rem; margin: .5rem 0; }
nav a { display: inline-block; margin-right: 1.2rem; padding: .3rem 0; color: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-size: .9rem; vertical-align: bottom; } tr.marked td { font-weight: 700; }
.numbers :is(td, th):not(:first-child) { text-align: right; padding: .3rem .2rem .3rem .7rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem 2rem;
  margin: 1rem 0; }
figure { margin: 0; max-width: 32rem; } figcaption, .meta { color: var(--soft); font-size: .9rem; } svg { display: block; width: 100%; }
svg text { font-size: 12px; fill: var(--soft); } .grid { stroke: var(--line); } rect.kept { fill: var(--kept); }
rect.dropped { fill: var(--dropped); } .threshold { stroke: var(--bad); stroke-dasharray: 4; }
polyline { fill: none; stroke: var(--ink); stroke-width: 2; } circle { fill: var(--ink); } .marked { fill: var(--bad); }
.plots img { width: 100%; border: 1px solid var(--line); }
.record { margin: 1rem 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem; }
.head { display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: .6rem; } .head div { flex: 1 1 11rem; min-width: 0; }
.head img { width: 8rem; height: 8rem; object-fit: contain; background: #f3f4f6; image-rendering: pixelated; }
.head p { margin: 0; } .candidates { display: grid; gap: .5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.candidate { padding: .4rem .6rem; background: #f9fafb; border-left: 4px solid #d1d5db; white-space: pre-wrap;
  font-size: .9rem; min-width: 0; } .chosen { border-color: var(--kept); background: #f0fdf4; }
.rejected { border-color: var(--bad); } mark { background: #fde68a; border-radius: .2rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } table.numbers { font-size: .75rem; } th { font-size: inherit; }
  th, td { padding-right: .5rem; } .numbers :is(td, th):not(:first-child) { padding: .3rem .1rem .3rem .35rem; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page asks for nothing, runs nothing


def table(head: list[str], rows: list[list[Any]], kind: str = "", marked: int | None = None) -> str:
    """Cells as an HTML table that scrolls sideways where it is too wide; row number `marked` is bold."""
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f'<tr class="marked">{cells}</tr>' if number == marked else f"<tr>{cells}</tr>")
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll"><table class="{kind}"><tr>{names}</tr>{"".join(lines)}</table></div>'


def results_section(work: Path) -> str:
    """table.md, which llava.eval.report wrote."""
    path = work / "table.md"
    if not path.is_file():
        raise UserError(f"{path} does not exist. Fix: finish run_sicog.sh first; llava.eval.report writes it")
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    head, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    notes = "".join(f"<li>{escape(line[2:])}</li>" for line in text.splitlines() if line.startswith("* "))
    best = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", table(head, rows))
    return f'{best}<ul class="meta">{notes}</ul>'


def stages_section(work: Path) -> str:
    """Folder, seconds, counts and what did not complete of every run below the work folder, in the order they finished."""
    runs = [(path.parent, json.loads(path.read_text())) for path in work.glob("**/run.json")]
    runs.sort(key=lambda run: run[1]["saved"])
    rows = []
    for folder, state in runs:
        ended = "" if state["status"] == "complete" else f"{state['status']} after "
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in state["counts"].items())
        rows.append([folder.relative_to(work).as_posix(), f"{ended}{state['seconds']:.0f} s", counts])
    return table(["stage", "time", "counts"], rows)


def losses_section(work: Path) -> str:
    plots = []
    for plot in sorted(work.glob("*/loss.png"), key=lambda path: path.stat().st_mtime):
        name = escape(plot.parent.name)
        data = base64.b64encode(plot.read_bytes()).decode()
        plots.append(f'<figure><img alt="loss of {name}" src="data:image/png;base64,{data}"></figure>')
    return f'<div class="columns plots">{"".join(plots)}</div>'


def thumbnail(folder: str, name: str) -> str:
    """An image as <img> with its data inside; where it cannot be read, the reason."""
    try:
        image = load_image(find_image(folder, name))
    except ImageError as error:
        return f'<p class="meta">{escape(str(error))}</p>'
    image.thumbnail((320, 320))
    small = image.width * image.height < 40_000
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/{"png" if small else "jpeg"};base64,{data}">'


def pieces_of(text: str) -> list[str]:
    """Words, single marks and the blanks between them; joined they are the text again."""
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def differences(text: str, chosen: str) -> str:
    """The text as HTML, its words that the chosen text does not have at that place in <mark>.

    >>> differences("a red cross", "a blue cross")
    'a <mark>red</mark> cross'
    """
    pieces = pieces_of(text)
    words = [place for place, piece in enumerate(pieces) if not piece.isspace()]
    theirs = [piece for piece in pieces_of(chosen) if not piece.isspace()]
    matcher = difflib.SequenceMatcher(None, [pieces[place] for place in words], theirs, autojunk=False)
    for kind, start, end, _, _ in matcher.get_opcodes():
        if kind in ("delete", "replace"):  # marked from the first to the last word, blanks between them included
            first, last = words[start], words[end - 1]
            for place in range(first, last + 1):
                pieces[place] = escape(pieces[place])
            pieces[first] = "<mark>" + pieces[first]
            pieces[last] += "</mark>"
        elif kind == "equal":
            for place in words[start:end]:
                pieces[place] = escape(pieces[place])
    return "".join(pieces)


def shown(text: str) -> tuple[str, str]:
    """What is shown of a text, and a note on what is not."""
    return text[:LONGEST], f"… {len(text) - LONGEST:,} more characters" if len(text) > LONGEST else ""


def candidate_cell(record: Record, index: int) -> str:
    candidate, decision = record["candidates"][index], record["decision"]
    text, more = shown(candidate["text"])
    if index == decision["chosen"]:
        role, body = "chosen", escape(text)
    else:
        role = "rejected" if index == decision["rejected"] else ""
        body = differences(text, shown(record["candidates"][decision["chosen"]]["text"])[0])
    facts = [f"#{index}", f"{candidate['score']:.3f}", role, candidate.get("style"), candidate.get("corruption")]
    facts += [f"round {candidate['round']}"] if "round" in candidate else []
    facts += ["cut off"] if candidate.get("finish_reason") == "length" else []
    line = escape(" · ".join(str(fact) for fact in facts if fact))
    return f'<div class="candidate {role}"><span class="meta">{line}</span>\n{body}{more}</div>'


def record_card(folder: str, record: Record) -> str:
    """Images, question, the decision, and every candidate with its score, the best first."""
    decision, candidates = record["decision"], record["candidates"]
    verdict = "kept" if decision["kept"] else "dropped"
    reason = f"best score {decision['score']:.3f} {'≥' if decision['kept'] else '<'} {decision['threshold']:g}"
    order = sorted(range(len(candidates)), key=lambda index: (index != decision["chosen"], -candidates[index]["score"]))
    return (
        f'<article class="record"><div class="head">{"".join(thumbnail(folder, name) for name in images_of(record)[:4])}'
        f"<div><p><b>{verdict}</b>: {reason}</p><p>{escape(without_image(question_of(record)))}</p>"
        f'<p class="meta">{escape(record["id"])}</p></div></div>'
        f'<div class="candidates">{"".join(candidate_cell(record, index) for index in order)}</div></article>'
    )


def threshold_part(found: Tally) -> str:
    rows = found.sweep()
    marked = found.thresholds.index(found.threshold)
    shares = [(threshold, records / found.records) for threshold, records, _, _ in rows if threshold >= 0]
    cells = [
        [f"{threshold:g}", f"{records:,}", f"{records / found.records:.1%}"]
        + ([f"{score:.3f}", f"{words:.1f}"] if records else ["–", "–"])
        for threshold, records, score, words in rows
    ]
    charts = histogram(found.histogram, BINS, found.threshold, "Best score of each record: green kept, gray dropped")
    charts += curve(shares, "Share of records kept, by threshold", lambda share: f"{share:.0%}", 1, found.threshold)
    return (
        f'<div class="columns">{charts}</div><h3>Other thresholds</h3>'
        "<p>What this file would give at another THRESHOLD, without judging again; bold is the one used.</p>"
        + table(["threshold", "kept", "share", "mean score", "words of the chosen"], cells, "numbers", marked)
    )


def styles_part(found: Tally) -> str:
    total = sum(style.candidates for style in found.styles.values())
    rows = []
    for name, style in sorted(found.styles.items()):
        candidates = [
            f"{style.candidates:,}",
            f"{style.candidates / total:.1%}",
            f"{style.score / style.candidates:.3f}",
        ]
        rows.append([name, *candidates, f"{style.wins:,}", f"{style.wins / found.records:.1%}"])
    return (
        "<h3>Agreement by prompt style</h3><p>A style wins a record when its candidate is chosen. A share of wins far "
        "above its share of candidates says that one prompt decides what is trained on.</p>"
        + table(["style", "candidates", "share", "mean score", "wins", "share of wins"], rows, "numbers")
    )


def rounds_part(found: Tally) -> str:
    """One row per round, and from two rounds on a chart of each number that shows a collapse."""
    pairs, size = found.distinct_2()
    rounds = sorted(found.rounds.items())
    measures = [  # name, how it is written, least height of its chart, value in each round
        ("words", "{:.1f}".format, 10, [each.words / each.candidates for _, each in rounds]),
        ("distinct-2", "{:.4f}".format, 0, [pairs[number] for number, _ in rounds]),
        ("repeats", "{:.1%}".format, 0.1, [share(each.repeated, each.long_enough) for _, each in rounds]),
        ("cut off", "{:.1%}".format, 0.1, [share(each.cut_off, each.finished) for _, each in rounds]),
        ("score", "{:.3f}".format, 1, [each.score / each.candidates for _, each in rounds]),
    ]
    rows = [[number, f"{each.candidates:,}"] for number, each in rounds]
    charts = []
    for name, write, least, values in measures:
        for row, value in zip(rows, values, strict=True):
            row.append("–" if value is None else write(value))
        points = [(number, value) for (number, _), value in zip(rounds, values, strict=True) if value is not None]
        if len(points) > 1:
            highest = max(least, *(value for _, value in points))
            charts.append(curve(points, f"{name}, by round", write, highest, None))
    return (
        "<h3>Does the model collapse?</h3><p>Means over the candidates of each round. A collapsing model writes shorter or "
        "endless texts, the same word pairs everywhere (distinct-2 falls), repeats itself within a text (repeats: share of "
        "its runs of four words that occurred before), and agrees with itself more. Distinct-2 is measured on "
        f"{size:,} word pairs of a sample, as many in every round.</p>"
        + table(["round", "texts", *(name for name, *_ in measures)], rows, "numbers")
        + f'<div class="columns">{"".join(charts)}</div>'
    )


def share(part: float, whole: int) -> float | None:
    """None where there is nothing to have a share of."""
    return part / whole if whole else None


def run_note(curated: Path, found: Tally) -> str:
    """What run.json says about how the file was made."""
    note = f"{found.kept:,} of {found.records:,} records kept: best score at least {found.threshold:g}. "
    path = curated / "run.json"
    if path.is_file():
        state = json.loads(path.read_text())
        known, counts = state["arguments"], state["counts"]
        facts = [f"{name} {known[name]}" for name in ("kind", "score", "encoder", "seed") if name in known]
        note += f"{', '.join(facts).capitalize()}; commit {state['commit']}. "
        left_out, rejected = counts.get("left_out_candidates", 0), counts.get("rejected", 0)
        note += f"Not judged: {left_out:,} candidates, empty or cut off; {rejected:,} records with too few left."
    return f"<p>{escape(note)}</p>"


def curation_section(curated: Path, folder: str) -> str:
    """Everything about one scored.jsonl, which is read once."""
    found = tally(curated / "scored.jsonl")
    if found is None:
        return "<p>No record was judged.</p>"
    parts = [run_note(curated, found), threshold_part(found), styles_part(found), rounds_part(found)]
    for title, sample in (("Kept", found.kept_sample), ("Dropped", found.dropped_sample)):
        parts.append(f"<h3>{title}: {len(sample.items)} of {sample.seen:,}</h3>")
        if sample.items:
            parts.append("<p>Drawn at random. <mark>Marked</mark>: words the chosen text does not have there.</p>")
        parts += [record_card(folder, record) for record in sorted(sample.items, key=lambda item: item["id"])]
    return "".join(parts)


def image_folder_of(curated: Path) -> str:
    """Root of the images of a curation, as its candidates' runs recorded it; the folder itself where none did."""
    path = curated / "run.json"
    inputs = json.loads(path.read_text())["inputs"] if path.is_file() else {}
    for candidates in inputs:
        made = Path(candidates).parent / "run.json"
        if made.is_file():
            known = json.loads(made.read_text())["arguments"]
            if "data_path" in known:
                return known.get("image_folder") or str(Path(known["data_path"]).parent)
    return str(curated)


def page(title: str, sections: list[tuple[str, str]]) -> str:
    """Titled sections as one HTML document."""
    links = "".join(f'<a href="#{number}">{escape(name)}</a>' for number, (name, _) in enumerate(sections))
    nav = f"<nav>{links}</nav>" if len(sections) > 1 else ""
    body = "".join(f'<h2 id="{number}">{escape(name)}</h2>{part}' for number, (name, part) in enumerate(sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{nav}<main>{body}</main></body></html>\n"
    )


def build(work: Path, folder: str) -> str:
    """The page about a whole run of run_sicog.sh."""
    sections = [
        ("Base model against SICOG", results_section(work)),
        ("Stages", stages_section(work)),
        ("Losses", losses_section(work)),
    ]
    for path in sorted(work.glob("curated/*/scored.jsonl")):
        sections.append((f"Curated {path.parent.name}", curation_section(path.parent, folder)))
    return page(work.name, sections)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work_dir", help="folder of a run_sicog.sh run")
    parser.add_argument("--curated", help="instead: folder of one curation run")
    parser.add_argument("--image_folder", help="root of the records' image paths; with --curated it is looked up")
    parser.add_argument("--output", help="page to write (default: report.html in the folder)")
    arguments = parser.parse_args()
    if bool(arguments.work_dir) == bool(arguments.curated):
        raise UserError("give either --work_dir FOLDER of a whole run, or --curated FOLDER of one curation")
    if arguments.curated:
        work = Path(arguments.curated)
        folder = arguments.image_folder or image_folder_of(work)
        text = page(work.name, [("Curated", curation_section(work, folder))])
    elif arguments.image_folder:
        work = Path(arguments.work_dir)
        text = build(work, arguments.image_folder)
    else:
        raise UserError("--image_folder is missing. Fix: give the root of the records' image paths")
    output = Path(arguments.output or work / "report.html")
    write_atomically(output, [text])
    print(f"report: {output}")


if __name__ == "__main__":
    run_command(main)
