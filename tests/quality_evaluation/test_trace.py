"""A record's history, on a work folder that the commands themselves wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import UserError
from llava.prompts import COD_HEADINGS, render_steps
from llava.records import sha256_of, write_records
from llava.runs import open_run
from quality_evaluation import curate, lineage, pairs, trace
from tests.loopback import Loopback, completion
from training_data_annotation import annotate_captions, convert_reasoning

CIRCLE = "A large red circle is at the top left."
TAGGED = (
    "<SUMMARY>Find it.</SUMMARY><CAPTION>A circle.</CAPTION><REASONING>Look.</REASONING><CONCLUSION>red</CONCLUSION>"
)
ROOT = Path(__file__).resolve().parents[2]


def record(identifier, question="What is this?", answer=None, **fields) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}]
    turns += [{"from": "gpt", "value": answer}] if answer else []
    return {"id": identifier, "image": "a.png", "conversations": turns, **fields}


def candidate(text: str, sample: int, **fields) -> dict:
    return {
        "text": text, "finish_reason": "stop", "tokens": 9, "sample": sample, "seed": 1000 + sample, "style": "cod-default",
        "instruction": "Describe the image.", "model": "runs/perception", "model_hash": "cafe", "corruption": None,
        "temperature": 0.7, **fields,
    }  # fmt: skip


def annotator(number: int, body: dict) -> tuple:
    """Answers every request, but not about images of record `bad`."""
    reply = (
        "no steps" if "bad" in body["messages"][1]["content"][0]["text"] else render_steps(COD_HEADINGS, [CIRCLE] * 5)
    )
    usage = {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33}
    return 200, {**completion([reply]), "model": "toy-annotator", "usage": usage}, {}


def command(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """runs/x as run_sicog.sh lays it out: annotated, candidates, curated, pretrained; sources in data/."""
    data, work = tmp_path / "data", tmp_path / "runs" / "x"
    data.mkdir()
    Image.new("RGB", (30, 20), "red").save(data / "a.png")
    (data / "captioned.json").write_text(
        json.dumps([record("cap-1", caption="a circle"), record("cap-bad", "bad", "bad one")])
    )
    write_records(data / "reasoning.jsonl", [record("why-1", "Which colour?", TAGGED)])
    (data / "unlabelled.json").write_text(json.dumps([record(7), record("img-8"), record("img-9")], indent=1))

    folders = ["--output_cod_dir", work / "annotated/cod", "--output_dd_dir", work / "annotated/dd"]
    with Loopback(annotator) as server:
        address = ["--base_url", server.base_url]
        command(monkeypatch, annotate_captions, "--data_path", data / "captioned.json", *folders, *address)
    folders = ["--output_cot_dir", work / "annotated/cot", "--output_short_dir", work / "annotated/short"]
    command(monkeypatch, convert_reasoning, "--data_path", data / "reasoning.jsonl", *folders)

    source = data / "unlabelled.json"
    generated = work / "candidates/captions"
    settings = {"data_path": str(source), "image_folder": None, "style": "cod-default", "seed": 0}
    with open_run(generated, "generate captions", settings, [source]) as run:
        rows = [
            record(
                "7",
                candidates=[
                    candidate(CIRCLE, 0),
                    candidate(CIRCLE, 1, round=2),
                    candidate("cut", 2, finish_reason="length"),
                ],
            ),
            record("img-8", candidates=[candidate(CIRCLE, 0), candidate("Zwei Hunde am Strand.", 1)]),
        ]
        write_records(generated / "candidates.jsonl", rows)
        write_records(generated / "candidates.rejected.jsonl", [{"id": "img-9", "reason": "image cannot be read"}])
        shards = generated / "shards" / "shard-00000.jsonl"
        write_records(shards, rows)
        run.finish(generated / "candidates.jsonl")
    flags = ["--kind", "caption", "--threshold", 0.9, "--output_dir", work / "curated/captions"]
    command(monkeypatch, curate, "--candidates", generated / "candidates.jsonl", *flags)
    inputs = [work / "curated/captions/chosen.jsonl", work / "annotated/cod/cod.jsonl"]
    arguments = {"model_name_or_path": "runs/x/align", "data_path": ",".join(map(str, inputs))}
    with open_run(work / "pretrained", "train pretrained", arguments, inputs) as run:
        (work / "pretrained" / "log.jsonl").write_text('{"step": 7}\n')
        run.finish(work / "pretrained")
    return work


@pytest.fixture
def shown(work, monkeypatch, capsys):
    """The command's output about one id."""

    def call(identifier, *arguments) -> str:
        capsys.readouterr()
        command(monkeypatch, trace, identifier, *(arguments or ["--work_dir", work]))
        return capsys.readouterr().out

    return call


def test_a_kept_record_from_source_to_training(shown, work):
    text = shown("7")
    data = work.parent.parent / "data"
    assert text.startswith("7 in 4 files")  # source, candidates, scored, chosen
    for part in (
        f"{data / 'a.png'}, 30 x 20, sha256 {sha256_of(data / 'a.png')}",
        f"source    {data / 'unlabelled.json'}: 7",
        "generate captions, complete",
        "style cod-default, seed 0",
        "candidates: 3, of which 2 were judged",
        "not judged:",
        "kept: the best score 1.0 reaches the threshold 0.9; chosen: candidate 0, rejected: none",
        "candidate 0: score 1.0, chosen",
        "candidate 1: score 1.0\n",
        "model   runs/perception (cafe)",
        "asked   Describe the image. (cod-default)",
        "seed 1001, corruption none, temperature 0.7, round 2",
        "ended   length (9 tokens)",
        "threshold 0.9, score mean_cosine, encoder hashing",
        "a training record: the whole of candidate 0",
        "trained   " + str(work / "pretrained"),
    ):
        assert part in text, part
    assert text.count(CIRCLE) == 2  # each candidate is shown once
    assert text.index("source ") < text.index("generated ") < text.index("judged ") < text.index("trained ")
    assert "shards" not in text
    assert "log.jsonl" not in text


def test_a_dropped_record_and_a_rejected_one(shown):
    text = shown("img-8")
    assert "dropped: the best score" in text
    assert "is below the threshold 0.9" in text
    assert "Zwei Hunde am Strand." in text
    assert "trained   by no run" in text
    text = shown("img-9")
    assert "refused: image cannot be read" in text
    assert "source " in text


@pytest.mark.parametrize(
    ("identifier", "stage", "source", "others"),
    [
        ("cap-1-cod", "annotate captions", "cap-1", "cap-1-dd"),
        ("cap-1-dd", "annotate captions", "cap-1", "cap-1-cod"),
        ("why-1-cot", "convert reasoning", "why-1", "why-1-short"),
        ("why-1-short", "convert reasoning", "why-1", "why-1-cot"),
    ],
)
def test_annotated_records_lead_back_to_their_source(shown, identifier, stage, source, others):
    text = shown(identifier)
    assert stage in text  # also for dd and short, whose run.json lies in the other folder
    assert f"json: {source}\n" in text or f"jsonl: {source}\n" in text
    assert "sha256" in text
    assert others not in text
    if stage == "annotate captions":
        assert "answered in 5 steps; model toy-annotator, prompt_tokens 11, completion_tokens 22" in text
    assert ("trained   by no run" in text) == (identifier != "cap-1-cod")
    both = shown(source)
    assert f": {identifier}\n" in both
    assert f": {others}\n" in both


def test_a_refused_annotation_shows_the_reply_once(shown):
    text = shown("cap-bad")
    assert "refused: answer without the five steps" in text
    assert text.count("no steps") == 1
    assert "the same row" in text


def test_single_files_lead_upstream(shown, work):
    text = shown("7", "--records", work / "curated/captions/chosen.jsonl")
    assert "generate captions" in text
    assert "unlabelled.json: 7" in text
    assert "sha256" in text
    text = shown("why-1-short", "--records", work / "annotated/short/short.jsonl")
    assert "convert reasoning" in text
    assert "<CONCLUSION>red</CONCLUSION>" in text


def test_scored_records_alone_still_tell_everything(shown, work, tmp_path):
    alone = tmp_path / "alone" / "scored.jsonl"
    alone.parent.mkdir()
    alone.write_bytes((work / "curated/captions/scored.jsonl").read_bytes())
    text = shown("7", "--records", alone)
    assert "model   runs/perception (cafe)" in text
    assert "not found" in text
    assert "sha256" in shown("7", "--records", alone, "--image_folder", tmp_path / "data")


def test_what_is_gone_is_named(shown, work):
    (work.parent.parent / "data" / "unlabelled.json").unlink()
    text = shown("7")
    assert "unlabelled.json: a run read it, it is no longer here" in text
    assert "kept:" in text


@pytest.fixture
def paired(work, monkeypatch) -> Path:
    """The same with a preference pair of the annotated record why-1-cot."""
    annotated, noisy = work / "annotated/cot/cot.jsonl", work / "candidates/noisy"
    with open_run(noisy, "generate responses", {"corruptions": ["mask"]}, [annotated]) as run:
        row = {**json.loads(annotated.read_text()), "candidates": [candidate("It is blue.", 4, corruption="mask")]}
        write_records(noisy / "candidates.jsonl", [row])
        run.finish(noisy)
    sources = ["--annotated", annotated, "--corrupted", noisy / "candidates.jsonl"]
    images = ["--image_folder", work.parent.parent / "data"]
    command(monkeypatch, pairs, *sources, *images, "--output_dir", work / "pairs")
    return work


@pytest.mark.parametrize("identifier", ["why-1", "why-1-cot", "why-1-cot-corrupted"])
def test_a_preference_pair_from_source_to_both_sides(shown, paired, identifier):
    text = shown(identifier)
    data = paired.parent.parent / "data"
    for part in (
        f"source    {data / 'reasoning.jsonl'}: why-1\n",
        "convert reasoning, complete",
        f"annotated {paired}/annotated/cot/cot.jsonl: why-1-cot\n",
        "seed 1004, corruption mask",
        f"pair      {paired}/pairs/pairs.jsonl: why-1-cot-corrupted\n",
        f"a preference pair, corrupted, of why-1-cot in {paired}/annotated/cot/cot.jsonl",
        "chosen: origin annotation, stage convert, source why-1",
        "rejected: origin candidate, record why-1-cot",
    ):
        assert text.count(part) == 1, part
    assert text.index("source ") < text.index("annotated ") < text.index("generated ") < text.index("pair  ")
    assert "It is blue." in text


def test_an_id_in_two_sources_shows_both(shown, work, monkeypatch):
    data = work.parent.parent / "data"
    write_records(data / "other.jsonl", [record("img-8", "Another question?")])
    with open_run(work / "candidates/other", "generate captions", {}, [data / "other.jsonl"]) as run:
        write_records(
            work / "candidates/other/candidates.jsonl", [record("img-8", candidates=[candidate("Other.", 0)])]
        )
        run.finish(work)
    text = shown("img-8")
    assert "careful   the id is in 2 sources" in text
    assert "Another question?" in text
    assert "Other." in text
    assert "Zwei Hunde" in text


def test_an_unknown_id_names_close_ones(shown, work):
    with pytest.raises(UserError, match=r"no record with id 'img-88' in .* files; close: img-8"):
        shown("img-88")
    with pytest.raises(UserError, match=r"no record with id '\?' in \d+ files\. Fix"):
        shown("?")
    with pytest.raises(UserError, match="is no folder"):
        shown("7", "--work_dir", work / "nowhere")
    with pytest.raises(UserError, match="is no file"):
        shown("7", "--records", work / "nowhere.jsonl")


def test_the_command_says_one_sentence(work):
    command = [sys.executable, "-m", "quality_evaluation.trace", "img-88", "--work_dir", str(work)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no record")
    assert result.stderr.count("\n") == 1


def test_foreign_files_do_not_disturb(shown, work):
    (work / "annotated" / "run.json").write_text("no JSON")
    (work.parent.parent / "run.json").write_text('{"of": "another program"}')
    with (work / "candidates/captions/candidates.jsonl").open("a") as file:
        file.write('{"id": "7", "half')  # still being written
    assert "kept:" in shown("7")


def test_text_cannot_steer_the_terminal(shown, work, tmp_path):
    path = tmp_path / "hostile.jsonl"
    write_records(path, [record("h", answer="\x1b[2J\x1b]0;title\x07 \u202e tidy\nnext\u00e9")])
    text = shown("h", "--records", path)
    assert "\\x1b[2J\\x1b]0;title\\x07 \\u202e tidy\n" in text
    assert "nexté" in text


@pytest.mark.parametrize("block", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize(
    "shape", ["[]", " [ ] ", '\ufeff[{"id": 1},{"id": "[é\\"]", "list": [1, [2]]}\n, {"id": 3}]\n']
)
def test_lists_are_read_in_blocks(tmp_path, monkeypatch, block, shape):
    monkeypatch.setattr(lineage, "BLOCK", block)
    path = tmp_path / "list.json"
    path.write_text(shape, encoding="utf-8")
    assert list(lineage.rows_of(path)) == json.loads(shape.strip("\ufeff"))


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[{"id": 1}, {"id": ')
    with pytest.raises(UserError, match=r"broken\.json: is not valid JSON"):
        list(lineage.rows_of(path))
    path.write_text('{"id": 1}\n{"id": \n{"id": 2}\n')
    with pytest.raises(UserError, match=r"broken\.json line 2"):
        list(lineage.rows_of(path))


def test_ids_that_json_escapes(shown, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(record('é "7"\t/b')) + "\n" + json.dumps(record("日本"), ensure_ascii=False))
    assert "human" in shown('é "7"\t/b', "--records", path)
    assert "human" in shown("日本", "--records", path)


def test_large_files_are_streamed(tmp_path):
    """A 60 MB list in a process that may use little more than it needs to start."""
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(60_000):
            file.write(json.dumps(record(f"r-{number}", "x" * 1000)) + ",\n")
        file.write(json.dumps(record("last")) + "]")
    program = (
        "import re, sys; from quality_evaluation.trace import main; main(); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", program, "last", "--records", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert "last in 1 files" in result.stdout
    assert int(result.stdout.split()[-1]) < 150_000
