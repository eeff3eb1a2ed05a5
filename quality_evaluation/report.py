"""One HTML page about a run of the cycle: results, losses, what was kept and why. Opens offline.

reads   <work_dir>: table.md, */loss.png, curated/*/scored.jsonl, run.json of every stage
writes  <work_dir>/report.html, self-contained
"""

import argparse
import base64
import html
import io
import json
import random
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.images import ImageError, find_image, load_image
from llava.records import Record, images_of, question_of, read_jsonl, write_atomically

SHOWN = 6  # kept and dropped records in each gallery
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: #1f2937; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: left;
border-bottom: 1px solid #e5e7eb; } th { color: #6b7280; font-weight: 600; } td.number { text-align: right; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots img { width: 19rem; max-width: 100%; }
.record { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; padding: 1rem; border: 1px solid #e5e7eb;
border-radius: .5rem; } .record img { width: 9rem; height: 9rem; object-fit: contain; background: #f3f4f6; image-rendering: pixelated; }
.record > div { flex: 1; min-width: 16rem; } .candidate { margin: .4rem 0; padding: .4rem .6rem; background: #f9fafb;
border-left: 3px solid #d1d5db; white-space: pre-wrap; } .chosen { border-color: #16a34a; background: #f0fdf4; }
.rejected { border-color: #dc2626; } .meta { color: #6b7280; font-size: .85rem; } svg text { font-size: 11px; fill: #6b7280; }
"""


def escape(text: Any) -> str:
    return html.escape(str(text))


def markdown_table(text: str) -> str:
    """Our own table.md as HTML."""
    lines = [line.strip("| \n").split("|") for line in text.splitlines() if line.strip() and not line.startswith("|-")]
    cells = [[escape(cell.strip()) for cell in line] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def stage_rows(work: Path) -> list[list[str]]:
    """Folder, counts and seconds of every run below the work folder, in the order they finished."""
    runs = [(path.parent, json.loads(path.read_text())) for path in work.glob("**/run.json")]
    runs.sort(key=lambda run: run[1]["saved"])
    return [
        [
            folder.relative_to(work).as_posix(),
            state["status"],
            ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in state["counts"].items()),
            f"{state['seconds']:.0f} s",
        ]
        for folder, state in runs
    ]


def histogram(scores: list[float], threshold: float) -> str:
    """Scores as SVG bars between the lowest score and 1; bars below the threshold are gray."""
    low = min(int(min(scores) * 20) / 20, 0.95)
    bins = 24
    counts = [0] * bins
    for score in scores:
        counts[min(max(int((score - low) / (1 - low) * bins), 0), bins - 1)] += 1
    tallest = max(counts)
    bars = []
    for index, count in enumerate(counts):
        left = low + (1 - low) * index / bins
        color = "#16a34a" if left + (1 - low) / bins > threshold else "#9ca3af"
        height = 120 * count / tallest
        bars.append(
            f'<rect x="{index * 20 + 2}" y="{130 - height:.1f}" width="17" height="{height:.1f}" fill="{color}">'
            f"<title>{left:.2f}: {count}</title></rect>"
        )
    x = (threshold - low) / (1 - low) * bins * 20
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="5" y2="130" stroke="#dc2626" stroke-dasharray="4"/>'
    labels = f'<text x="2" y="146">{low:.2f}</text><text x="456" y="146">1.00</text><text x="{x + 4:.1f}" y="14">threshold {threshold}</text>'
    return f'<svg viewBox="0 0 482 150" width="482" style="max-width:100%">{"".join(bars)}{line}{labels}</svg>'


def thumbnail(folder: str, record: Record) -> str:
    """The record's first image as an <img> with its data inside."""
    try:
        image = load_image(find_image(folder, images_of(record)[0]))
    except ImageError as error:
        return f'<span class="meta">{escape(error)}</span>'
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if image.width * image.height < 40_000 else "JPEG", quality=85)
    kind = "png" if image.width * image.height < 40_000 else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(images_of(record)[0])}" src="data:image/{kind};base64,{data}">'


def record_card(folder: str, record: Record) -> str:
    """Image, question, every candidate with its score, and the decision."""
    decision = record["decision"]
    rows = []
    for index, candidate in enumerate(record["candidates"]):
        role = "chosen" if index == decision["chosen"] else "rejected" if index == decision["rejected"] else ""
        label = f"{candidate['score']:.3f} · {candidate.get('style', '')} {role}"
        rows.append(
            f'<div class="candidate {role}"><span class="meta">{escape(label)}</span>\n{escape(candidate["text"])}</div>'
        )
    verdict = "kept" if decision["kept"] else "dropped"
    reason = f"best score {decision['score']:.3f} {'>=' if decision['kept'] else '<'} {decision['threshold']}"
    question = escape(question_of(record).replace("<image>", "").strip())
    return (
        f'<div class="record">{thumbnail(folder, record)}<div><b>{verdict}</b>: {reason}'
        f'<div class="meta">{escape(record["id"])} · {question}</div>{"".join(rows)}</div></div>'
    )


def curation_section(path: Path, folder: str) -> str:
    """Histogram and gallery of one scored.jsonl."""
    records = list(read_jsonl(path))
    scores = [record["decision"]["score"] for record in records]
    threshold = records[0]["decision"]["threshold"]
    kept = [record for record in records if record["decision"]["kept"]]
    dropped = [record for record in records if not record["decision"]["kept"]]
    rng = random.Random(0)
    parts = [
        f"<h2>Curated {escape(path.parent.name)}</h2><p>{len(kept):,} of {len(records):,} records kept "
        f"(best score at least {threshold}). Score of the best candidate of each record:</p>",
        histogram(scores, threshold),
    ]
    for title, group in (("Kept", kept), ("Dropped", dropped)):
        shown = rng.sample(group, min(SHOWN, len(group)))
        parts.append(f"<h3>{title}: {len(shown)} of {len(group):,}</h3>")
        parts += [record_card(folder, record) for record in shown]
    return "".join(parts)


def build(work: Path, folder: str) -> str:
    table = work / "table.md"
    if not table.is_file():
        raise UserError(f"{table} does not exist. Fix: finish run_sicog.sh first; llava.eval.report writes it")
    parts = [f"<h1>{escape(work.name)}</h1>", "<h2>Base model against SICOG</h2>", markdown_table(table.read_text())]
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in stage_rows(work))
    parts.append(
        f'<h2>Stages</h2><div class="scroll"><table><tr><th>stage</th><th>status</th><th>counts</th><th>time</th></tr>{rows}</table></div>'
    )
    plots = []
    for plot in sorted(work.glob("*/loss.png"), key=lambda path: path.stat().st_mtime):
        data = base64.b64encode(plot.read_bytes()).decode()
        plots.append(f'<img alt="loss of {escape(plot.parent.name)}" src="data:image/png;base64,{data}">')
    parts.append(f'<h2>Losses</h2><div class="plots">{"".join(plots)}</div>')
    parts += [curation_section(path, folder) for path in sorted(work.glob("curated/*/scored.jsonl"))]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(work.name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work_dir", required=True, help="folder of a run_sicog.sh run")
    parser.add_argument("--image_folder", required=True, help="root of the records' image paths")
    arguments = parser.parse_args()
    work = Path(arguments.work_dir)
    write_atomically(work / "report.html", [build(work, arguments.image_folder)])
    print(f"report: {work / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
