"""The report: sums against arithmetic by hand, hostile text, size and memory, and what a phone makes of the page."""

import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from llava.errors import UserError
from quality_evaluation import report
from quality_evaluation.charts import curve, histogram
from quality_evaluation.tally import BINS, PAIRS, Reservoir, Tally, bin_of, tally

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def judged(identifier: str, *candidates: tuple, threshold: float = 0.8, **fields) -> dict:
    """A scored record; candidates are (text, score, more fields), the best is chosen."""
    rows = [{"text": text, "score": score, **(more[0] if more else {})} for text, score, *more in candidates]
    chosen = max(range(len(rows)), key=lambda index: rows[index]["score"])
    score = rows[chosen]["score"]
    others = [index for index in range(len(rows)) if index != chosen]
    return {
        "id": identifier,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}],
        "candidates": rows,
        "decision": {
            "chosen": chosen, "rejected": others[0] if others else None, "score": score, "threshold": threshold,
            "kept": score >= threshold,
        },
        **fields,
    }  # fmt: skip


def write(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def curated(tmp_path) -> Path:
    """A folder with 60 judged records of two styles and two rounds, and their image."""
    rng = random.Random(0)
    words = ["red", "circle", "large", "the", "left", "at", "top"]
    records = []
    for number in range(60):
        texts = [" ".join(rng.choice(words) for _ in range(rng.randint(5, 90))) for _ in range(3)]
        more = [
            {"style": style, "round": 1 + number % 2, "finish_reason": "stop"} for style in ("cod", "cod", "direct")
        ]
        records.append(judged(f"r-{number}", *zip(texts, [rng.random() for _ in range(3)], more, strict=True)))
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png")
    return write(tmp_path / "curated" / "captions", records)


@pytest.fixture
def make(monkeypatch):
    """Run the command; returns the page it wrote."""

    def call(*arguments, output: Path) -> str:
        command = ["report", *arguments, "--output", output]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        report.main()
        return output.read_text()

    return call


# Sums


def test_sums_by_hand(tmp_path):
    stop, length = {"finish_reason": "stop"}, {"finish_reason": "length"}
    records = [
        judged("a", ("one two", 0.9, {"style": "cod", **stop}), ("one", 0.7, {"style": "direct", **length})),
        judged("b", ("a b c d e f", 0.6, {"style": "direct"}), ("a", 0.2, {"style": "cod"})),
        judged("c", ("a b c d a b c d", 0.8, {"style": "cod", **stop}), ("x", 0.8, {"style": "direct", **stop})),
    ]
    found = tally(write(tmp_path, records) / "scored.jsonl")
    assert (found.records, found.kept) == (3, 2)
    rows = {threshold: row for threshold, *row in found.sweep()}
    assert list(rows) == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert rows[0.5] == pytest.approx([3, (0.9 + 0.6 + 0.8) / 3, (2 + 6 + 8) / 3])
    assert rows[0.6] == rows[0.5]  # a score that equals the threshold is kept
    assert rows[0.65] == pytest.approx([2, 0.85, 5])
    assert rows[0.8] == pytest.approx([2, 0.85, 5])
    assert rows[0.85] == pytest.approx([1, 0.9, 2])
    assert rows[0.95] == [0, 0, 0]
    assert found.histogram == {36: [1, 0], 24: [0, 1], 32: [1, 0]}
    cod, direct = found.styles["cod"], found.styles["direct"]
    assert (cod.candidates, cod.score, cod.wins) == (3, pytest.approx(1.9), 2)
    assert (direct.candidates, direct.score, direct.wins) == (3, pytest.approx(2.1), 1)
    only = found.rounds[1]
    assert (only.candidates, only.words, only.cut_off, only.finished) == (6, 19, 1, 4)
    assert only.long_enough == 2  # texts of four words or more
    assert only.repeated == pytest.approx(1 / 5)  # "a b c d" twice among five runs of four words
    # pairs: one two; a b, b c, c d, d e, e f; a b, b c, c d, d a, a b, b c, c d
    assert found.distinct_2() == ({1: pytest.approx(7 / 13)}, 13)


def test_rounds_are_compared_on_equally_many_pairs():
    found = Tally(0.8)
    for number in range(50):
        found.add(judged(f"a{number}", (f"{number} x{number} y{number}", 0.9, {"round": 1})))
        found.add(judged(f"b{number}", ("the same words again and again", 0.9, {"round": 2})))
        found.add(judged(f"c{number}", ("word", 0.9, {"round": 3})))
    values, size = found.distinct_2()
    assert size == 100
    assert values == {1: 1.0, 2: pytest.approx(5 / 100), 3: None}
    found.add(judged("long", (" ".join(map(str, range(2 * PAIRS))), 0.9, {"round": 4})))
    assert len(found.rounds[4].bigrams()) == PAIRS


def test_a_threshold_outside_the_sweep_gets_a_row_and_one_below_all_keeps_all():
    for threshold in (0.83, -1):
        found = Tally(threshold)
        found.add(judged("a", ("text", 0.3), threshold=threshold))
        assert threshold in [row[0] for row in found.sweep()]
    assert found.sweep()[0] == (-1, 1, 0.3, 1)


def test_reservoirs_are_uniform_bounded_and_repeatable():
    counts = [0] * 20
    for start in range(400):
        sample = Reservoir(5)
        sample.rng.seed(start)
        for item in range(20):
            sample.add(item)
        assert len(sample.items) == 5
        for item in sample.items:
            counts[item] += 1
    assert min(counts) > 60  # 100 expected, 4.6 standard deviations
    assert max(counts) < 140


def test_styles_without_end_are_counted_together():
    found = Tally(0.8)
    for number in range(100):
        found.add(judged(str(number), ("text", 0.9, {"style": f"style-{number}"})))
    assert len(found.styles) == 21
    assert found.styles["other"].wins == 80


@pytest.mark.parametrize(("score", "number"), [(1.0, 39), (0.8, 32), (0.799999, 31), (0.0, 0), (-0.01, -1), (-5, -40)])
def test_bins(score, number):
    assert bin_of(score) == number


# Markup


def test_differences_mark_words_and_nothing_else():
    assert report.differences("a red cross", "a blue cross") == "a <mark>red</mark> cross"
    assert report.differences("same text.", "same text.") == "same text."
    assert report.differences("one  two three\nfour", "one four") == "one  <mark>two three</mark>\nfour"
    assert report.differences("", "text") == ""
    assert report.differences("text", "") == "<mark>text</mark>"
    assert report.differences("a <b> & 'c'", "a d") == "a <mark>&lt;b&gt; &amp; &#x27;c&#x27;</mark>"


def test_differences_lose_no_character():
    rng = random.Random(0)
    for _ in range(300):
        text, other = ("".join(rng.choice("ab <>&.\n日é") for _ in range(rng.randint(0, 30))) for _ in range(2))
        marked = report.differences(text, other)
        assert re.sub("</?mark>", "", marked) == report.escape(text)


@pytest.mark.parametrize("threshold", [0.8, 0.83, 0.1, -1, 1.5])
@pytest.mark.parametrize("bins", [{39: [5, 0]}, {-40: [0, 1], 39: [1, 0]}, {20: [0, 7], 33: [1000, 1]}])
def test_charts_are_well_formed_and_stay_inside(bins, threshold):
    for chart in (
        histogram(bins, BINS, threshold, "Scores & <more>"),
        curve([(1, 0.0)], "One", "{:g}".format, 1, None),
        curve([(0.5, 1.0), (0.8, 0.5), (0.95, 0.0)], "Three", "{:.0%}".format, 1, 0.8),
    ):
        tree = ElementTree.fromstring(chart)
        assert tree.find("svg/title").text
        for shape in tree.iter():
            for name in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy"):
                assert -0.1 <= float(shape.get(name, 0)) <= 400.1
    assert f"threshold {threshold:g}" in histogram(bins, BINS, threshold, "Scores")


class Page(HTMLParser):
    """Tags that are open at the end, every tag seen, and the addresses the page would ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_a_record_holds_becomes_markup(tmp_path, make):
    evil = '</div><script>alert("x")</script><img src=http://evil/x onerror=alert(1)>'
    record = judged(evil, (evil, 0.9, {"style": evil, "corruption": evil}), ("other " + evil, 0.8), image=evil)
    record["conversations"][0]["value"] = f"<image>\n{evil}"
    text = make("--curated", write(tmp_path / "c<b>", [record]), output=tmp_path / "page.html")
    page = Page(text)
    assert page.open == ["html", "body"] or not page.open
    assert "script" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert text.count("&lt;script&gt;") >= 5


def test_a_curation_alone(curated, tmp_path, make):
    text = make("--curated", curated, "--image_folder", tmp_path, output=tmp_path / "page.html")
    page = Page(text)
    assert page.tags.count("article") == 12
    assert page.tags.count("img") == 12
    assert page.tags.count("svg") == 2 + 5  # two rounds: a chart for each number
    for part in ("threshold 0.8", "Does the model collapse?", "chosen", "rejected", "round 2", "<mark>", "direct"):
        assert part in text
    assert "http" not in text.replace("http-equiv", "")
    again = make("--curated", curated, "--image_folder", tmp_path, output=tmp_path / "again.html")
    assert again == text


def test_the_image_folder_is_found_through_the_runs(curated, tmp_path, make):
    generated = tmp_path / "candidates"
    generated.mkdir()
    state = {"arguments": {"data_path": str(tmp_path / "data.json"), "image_folder": None}}
    (generated / "run.json").write_text(json.dumps(state))
    state = {
        "arguments": {"kind": "caption", "encoder": "hashing"}, "commit": "abc",
        "counts": {"left_out_candidates": 7, "rejected": 2}, "inputs": {str(generated / "candidates.jsonl"): "0"},
    }  # fmt: skip
    (curated / "run.json").write_text(json.dumps(state))
    text = make("--curated", curated, output=tmp_path / "page.html")
    assert Page(text).tags.count("img") == 12
    assert "7 candidates, empty or cut off; 2 records" in text


def test_records_without_images_and_images_that_are_missing(tmp_path, make):
    records = [
        judged("text-only", ("one", 0.9), ("two", 0.5), image=None),
        judged("several", ("one", 0.9), ("two", 0.5), image=["a.png", "../b.png"]),
    ]
    text = make("--curated", write(tmp_path, records), output=tmp_path / "page.html")
    assert "cannot be opened" in text
    assert "without &#x27;..&#x27;" in text


def test_a_whole_run(curated, tmp_path, make):
    (tmp_path / "table.md").write_text("| benchmark | base |\n|---|---|\n| Toy<b> | 1.0% |\n")
    Image.new("RGB", (20, 10)).save(curated.parent / "loss.png")
    state = {"status": "failed", "saved": 1, "seconds": 3.2, "counts": {"in": 1000, "left_out": 2}}
    (curated.parent / "run.json").write_text(json.dumps(state))
    text = make("--work_dir", tmp_path, "--image_folder", tmp_path, output=tmp_path / "page.html")
    for part in ("Toy&lt;b&gt;", "failed after 3 s", "1,000 in, 2 left out", "loss of curated", "Curated captions"):
        assert part in text
    assert Page(text).open == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --work_dir"),
        (["--work_dir", ".", "--curated", "."], "give either --work_dir"),
        (["--work_dir", "."], "--image_folder is missing"),
        (["--work_dir", "nowhere", "--image_folder", "."], "finish run_sicog.sh first"),
        (["--curated", "nowhere"], "does not exist"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, make):
    with pytest.raises(UserError, match=message):
        make(*arguments, output=tmp_path / "page.html")


def test_rows_that_were_never_judged(tmp_path, make):
    write(tmp_path, [{"id": "a", "conversations": []}])
    with pytest.raises(UserError, match="without a decision"):
        make("--curated", tmp_path, output=tmp_path / "page.html")
    write(tmp_path, [])
    assert "No record was judged" in make("--curated", tmp_path, output=tmp_path / "page.html")


# Size, memory, and a browser


def peak_memory(folder: Path, page: Path) -> int:
    """Peak resident kB of the command in a process of its own."""
    program = (
        "import re, sys; from quality_evaluation.report import main; main(); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", program, "--curated", str(folder), "--output", str(page)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(result.stdout.split()[-1])


@pytest.mark.slow
def test_a_hundred_thousand_records(tmp_path):
    """Under 10 MB, and no more memory than for two thousand."""
    rng = random.Random(0)
    Image.effect_noise((800, 800), 80).convert("RGB").save(tmp_path / "a.png")  # compresses badly
    texts = [" ".join(f"word{rng.randrange(3000)}" for _ in range(60)) for _ in range(300)]
    peaks = []
    for count in (2_000, 100_000):
        with (tmp_path / "scored.jsonl").open("w") as file:
            for number in range(count):
                more = [{"style": "cod", "round": 1 + number % 3, "finish_reason": "stop"}] * 3
                scores = [rng.random() for _ in range(3)]
                record = judged(str(number), *zip(rng.sample(texts, 3), scores, more, strict=True))
                file.write(json.dumps(record) + "\n")
        peaks.append(peak_memory(tmp_path, tmp_path / "page.html"))
    assert (tmp_path / "scored.jsonl").stat().st_size > 150e6
    assert (tmp_path / "page.html").stat().st_size < 10e6
    assert peaks[1] < peaks[0] + 20_000, peaks


def browser(folder: Path, *arguments: str) -> str:
    """What headless Chromium prints, in a profile of its own."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [CHROMIUM, *quiet, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: nobody has looked at the report on a phone")
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(curated, tmp_path, make, width):
    records = [json.loads(line) for line in (curated / "scored.jsonl").read_text().splitlines()]
    for record in records:  # words that do not fit a line
        record["id"] = record["id"] + "/long" * 60
        record["candidates"][0]["text"] += " " + "unbreakable" * 30
        record["image"] = ["a.png", "a.png", "no-such-folder/" + "x" * 90]
    write(curated, records)
    (tmp_path / "table.md").write_text("| benchmark | base (95% interval) |" + " SICOG |" * 6 + "\n" + "| Toy |" * 8)
    text = make("--work_dir", tmp_path, "--image_folder", tmp_path, output=tmp_path / "page.html")
    address = (tmp_path / "page.html").as_uri()
    browser(tmp_path, f"--window-size={width},844", f"--screenshot={tmp_path / 'page.png'}", address)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (width, 844)
        assert len(shot.convert("RGB").getcolors(1 << 20)) > 20  # something was drawn

    # A window is at least 500 wide, a frame is not; the page's own policy lets no script measure it from inside.
    frame = (
        f'<iframe width="{width}" height="844" style="border: 0" srcdoc="{report.escape(text)}" onload="measure(this)">'
    )
    script = """<script>function measure(frame) {
        const page = frame.contentWindow, root = page.document.scrollingElement
        document.title = ["size", page.innerWidth, root.scrollWidth, page.document.images.length].join()
    }</script>"""
    (tmp_path / "frame.html").write_text(f'<meta charset="utf-8"><title></title>{script}{frame}</iframe>')
    seen = browser(tmp_path, "--window-size=1600,900", "--dump-dom", (tmp_path / "frame.html").as_uri())
    window, scroll, images = map(int, re.search(r"<title>size,(\d+),(\d+),(\d+)", seen).groups())
    assert window == width
    assert scroll <= window
    assert images == 24
