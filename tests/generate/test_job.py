import json
import subprocess
import sys

import pytest

from llava.generate.candidates import Sampling
from llava.generate.job import Job, run_job
from llava.ids import read_unique
from llava.prompts import caption_instruction
from llava.records import read_jsonl, write_records


@pytest.fixture
def job(checkpoint, world, tmp_path):
    return Job(
        model=str(checkpoint), data_path=str(world / "unlabelled_images.json"),
        output_dir=str(tmp_path / "run"), styles={"cod-default": 2},
        sampling=Sampling(temperature=1.0, max_new_tokens=5), batch_size=3,
    )  # fmt: skip


def output(job):
    return list(read_jsonl(job.output))


def test_every_record_comes_back_once_in_order_with_its_lineage(job, world):
    run_job(job, "generate captions")
    inputs = json.loads((world / "unlabelled_images.json").read_text())
    rows = output(job)
    assert [row["id"] for row in rows] == [record["id"] for record in inputs]
    assert [row["image"] for row in rows] == [record["image"] for record in inputs]
    for row in rows:
        assert [candidate["sample"] for candidate in row["candidates"]] == [0, 1]
        for candidate in row["candidates"]:
            assert candidate["instruction"] == caption_instruction("cod-default", "")
            assert candidate["style"] == "cod-default"
            assert (candidate["temperature"], candidate["top_p"], candidate["max_new_tokens"]) == (1.0, 0.9, 5)
            assert candidate["model_hash"]
            assert candidate["seed"]


def ranks(job, world_size, monkeypatch):
    """Run every rank of a job in turn in this process; rank 0 last, as it waits for the others and merges."""
    from pathlib import Path

    from llava.generate.job import generate_shard, merge

    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shards = Path(job.output_dir) / "shards"
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        generate_shard(job, shards)
    return merge(job, shards), shards


def test_shards_are_disjoint_and_complete_and_give_the_same_text(job, tmp_path, monkeypatch):
    counts, shards = ranks(job, 3, monkeypatch)
    parts = [{row["id"] for row in read_jsonl(path)} for path in sorted(shards.glob("shard-0000[0-2].jsonl"))]
    assert len(parts) == 3
    assert sum(map(len, parts)) == len(set().union(*parts)) == counts["in"] == counts["out"]
    sharded = output(job)
    from dataclasses import replace

    other = replace(job, output_dir=str(tmp_path / "one"), batch_size=5)
    ranks(other, 1, monkeypatch)
    texts = [[c["text"] for c in row["candidates"]] for row in sharded]
    assert texts == [[c["text"] for c in row["candidates"]] for row in output(other)]


def test_resume_skips_what_is_there(job, monkeypatch):
    from pathlib import Path

    shards = Path(job.output_dir) / "shards"
    first = json.loads(Path(job.data_path).read_text())[0]
    write_records(shards / "shard-00009.jsonl", [{**first, "candidates": [{"text": "from before"}]}])
    with (shards / "shard-00000.jsonl").open("w") as torn:
        torn.write('{"id": "torn')
    ranks(job, 2, monkeypatch)
    rows = output(job)
    assert rows[0]["candidates"] == [{"text": "from before"}]
    assert all(len(row["candidates"]) == 2 for row in rows[1:])


def test_unreadable_images_are_rejected_with_a_reason_and_shift_nothing(job, world, tmp_path, monkeypatch):
    from dataclasses import replace

    records = json.loads((world / "unlabelled_images.json").read_text())
    (world / "broken.png").write_bytes(b"not an image")
    records[1]["image"] = "broken.png"
    records[2].pop("image")
    path = world / "some_broken.json"
    path.write_text(json.dumps(records))
    job = replace(job, data_path=str(path))
    counts, _ = ranks(job, 1, monkeypatch)
    assert counts == {"in": len(records), "out": len(records) - 2, "rejected": 2, "candidates": 2 * (len(records) - 2)}
    assert [row["id"] for row in output(job)] == [record["id"] for record in [records[0], *records[3:]]]
    rejected = list(read_jsonl(job.output.with_name("candidates.rejected.jsonl")))
    assert [row["id"] for row in rejected] == [records[1]["id"], records[2]["id"]]
    assert "broken.png" in rejected[0]["reason"]
    assert "no image" in rejected[1]["reason"]


def test_two_real_processes_share_the_work(job):
    """Two ranks as torchrun would start them."""
    import os

    flags = [
        "--model_name_or_path", job.model, "--data_path", job.data_path, "--output_dir", job.output_dir,
        "--n_candidates", "2", "--temperature", "1", "--max_new_tokens", "5",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llava.generate.recaption", *flags],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    rows = output(job)
    assert len(rows) == len(list(read_unique(job.data_path)))
    assert all(len(row["candidates"]) == 2 for row in rows)


def test_unknown_prompt_is_named(job):
    command = [sys.executable, "-m", "llava.generate.recaption", "--model_name_or_path", "x", "--data_path", "y"]
    command += ["--output_dir", "z", "--prompt", "poem"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: PROMPT is 'poem'; choose one of cod-default, cod-conv, default"


def test_several_styles_rounds_and_own_prompts_in_one_job(job, world, tmp_path):
    from dataclasses import replace

    both = replace(job, styles={"default": 1, "short": 2}, templates={"short": "{question} Be brief."}, round=2)
    run_job(both, "generate captions")
    [first, *_] = output(both)
    assert [c["style"] for c in first["candidates"]] == ["default", "short", "short"]
    assert [c["sample"] for c in first["candidates"]] == [0, 0, 1]
    question = first["conversations"][0]["value"].removeprefix("<image>\n")
    assert first["candidates"][1]["instruction"] == f"{question} Be brief."
    assert {c["round"] for c in first["candidates"]} == {2}
    run_job(replace(both, round=1, output_dir=str(tmp_path / "earlier")), "generate captions")
    earlier = [c["seed"] for row in read_jsonl(tmp_path / "earlier" / "candidates.jsonl") for c in row["candidates"]]
    assert not set(earlier) & {c["seed"] for row in output(both) for c in row["candidates"]}


def test_adaptive_drawing_spares_candidates_and_says_how_many(job):
    from dataclasses import replace

    greedy = replace(
        job, styles={"cod-default": 4}, sampling=Sampling(temperature=0, max_new_tokens=200), adaptive=0.99
    )
    run_job(greedy, "generate captions")
    rows = output(greedy)
    counts = json.loads((greedy.output.parent / "run.json").read_text())["counts"]
    assert counts["candidates"] == sum(len(row["candidates"]) for row in rows)
    assert counts["candidates_spared"] == 4 * len(rows) - counts["candidates"]
    for row in rows:  # equal texts agree, unless they are cut off, which says nothing
        ended = row["candidates"][0]["finish_reason"] == "stop"
        assert len(row["candidates"]) == (2 if ended and row["candidates"][0]["text"] else 4)


@pytest.mark.parametrize(
    ("prompt", "numbers", "message"),
    [
        ("default,default", "1", "names a prompt twice"),
        ("cod-default,default", "1,2,3", "one for each"),
        ("default", "0", "one number above 0"),
        ("default", "many", "one number above 0"),
    ],
)
def test_prompts_and_numbers_that_do_not_fit_are_named(prompt, numbers, message):
    from llava.errors import UserError
    from llava.generate.flags import wanted_candidates
    from llava.prompts import CAPTION_STYLES

    with pytest.raises(UserError, match=message):
        wanted_candidates(prompt, numbers, CAPTION_STYLES)


@pytest.mark.parametrize(
    ("shards", "memory"),
    [pytest.param(100_000, 40, id="quick"), pytest.param(1_000_000, 160, id="slow", marks=pytest.mark.slow)],
)
def test_merging_holds_little_of_each_record(tmp_path, shards, memory):
    """Megabytes that a merge adds to the process, for records of 400 bytes."""
    code = f"""
import json, sys
from pathlib import Path
from llava.generate.candidates import Sampling
from llava.generate.job import Job, merge
import numpy
folder = Path({str(tmp_path)!r})
with (folder / "in.jsonl").open("w") as data:
    for number in range({shards}):
        data.write(json.dumps({{"id": f"record-{{number}}", "image": "a.png", "conversations": [{{"from": "human", "value": "<image>"}}]}}) + chr(10))
(folder / "shards").mkdir()
for rank in range(4):
    with (folder / "shards" / f"shard-{{rank:05d}}.jsonl").open("w") as shard:
        for number in range(rank, {shards}, 4):
            shard.write(json.dumps({{"id": f"record-{{number}}", "candidates": [{{"text": "x" * 300, "finish_reason": "stop"}}]}}) + chr(10))
job = Job("m", str(folder / "in.jsonl"), str(folder), {{"default": 1}}, Sampling())
def peak():  # of this process alone: ru_maxrss begins with the parent's
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])
before = peak()
counts = merge(job, folder / "shards")
print(json.dumps([counts, (peak() - before) / 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counts, grown = json.loads(done.stdout)
    assert counts == {"in": shards, "out": shards, "rejected": 0, "candidates": shards}
    assert grown < memory
    with (tmp_path / "candidates.jsonl").open() as merged:
        assert all(json.loads(line)["id"] == f"record-{number}" for number, line in enumerate(merged))


def test_ids_in_little_memory():
    from llava.ids import IdSet

    ids = IdSet(f"id {number}" for number in range(150_000))  # more than are kept as objects
    assert len(ids) == 150_000
    assert "id 3" in ids
    assert "id 149999" in ids
    assert "id 150000" not in ids
    assert not ids.add("id 77")
    assert ids.add("new")


@pytest.mark.slow
def test_a_real_server_answers_as_the_checkpoint(checkpoint, job, tmp_path):
    """`transformers serve` on an exported checkpoint: greedy candidates through it equal local ones."""
    pytest.importorskip("fastapi", reason="the extra `demo` is not installed: NO REAL SERVER WAS ASKED")
    from dataclasses import replace

    from llava.model.export_hf import export
    from llava.model.verify import served

    exported = tmp_path / "exported"
    export(checkpoint, exported)
    greedy = replace(job, styles={"default": 1}, sampling=Sampling(temperature=0, max_new_tokens=8))
    run_job(greedy, "generate captions")
    with served(exported) as address:
        asked = replace(
            greedy, endpoint=f"{address}/v1", model=str(exported.resolve()), output_dir=str(tmp_path / "asked")
        )
        run_job(asked, "generate captions")
    assert [[c["text"] for c in row["candidates"]] for row in output(asked)] == [
        [c["text"] for c in row["candidates"]] for row in output(greedy)
    ]


def test_adaptive_with_beams_is_refused(job):
    command = [sys.executable, "-m", "llava.generate.recaption", "--model_name_or_path", "x", "--data_path", "y"]
    command += ["--output_dir", "z", "--adaptive", "0.9", "--num_beams", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "Fix: BEAMS=1" in result.stderr
