"""Run folders: who may write where, what a run records, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.runs import RunError, fingerprint, open_run

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ARGUMENTS = {"model": "toy", "temperature": 0.7, "styles": ["a", "b"]}


def state_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def refusal(folder: Path, stage="caption", arguments=ARGUMENTS, inputs=()) -> str:
    """The message with which opening `folder` is refused; the folder's run.json must stay as it is."""
    path = folder / "run.json"
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(RunError) as refused, open_run(folder, stage, arguments, list(inputs)):
        raise AssertionError("the folder was opened")
    assert (path.read_bytes() if path.exists() else None) == before
    return str(refused.value)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text('{"id": "1"}\n')
    return path


def test_a_finished_run_records_what_made_it(tmp_path, source, capsys):
    folder = tmp_path / "run"
    with open_run(folder, "caption", ARGUMENTS, [source]) as run:
        assert state_of(folder)["status"] == "running"
        assert not run.complete
        run.finish(folder / "out.jsonl", **{"in": 1200, "below_threshold": 3})
    state = state_of(folder)
    assert state["status"] == "complete"
    assert state["stage"] == "caption"
    assert state["arguments"] == ARGUMENTS
    assert state["counts"] == {"in": 1200, "below_threshold": 3}
    # printf '{"id": "1"}\n' | sha256sum
    assert state["inputs"] == {str(source): "f383647bf5e39c54"}
    assert state["command"][0] == sys.executable
    assert state["python"] == sys.version.split()[0]
    assert state["versions"]["pillow"].startswith("12.")
    assert set(state) >= {"commit", "host", "world_size", "started", "saved", "seconds"}
    assert state["started"] <= state["saved"] <= time.time()
    line = capsys.readouterr().out
    assert line.startswith("[caption] 1,200 in, 3 below threshold, ")
    assert line.endswith(f" s -> {folder / 'out.jsonl'}\n")


def test_the_same_arguments_continue_a_failed_run_with_its_files(tmp_path, source):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError), open_run(folder, "caption", ARGUMENTS, [source]):
        (tmp_path / "absent").read_text()
    (folder / "part.jsonl").write_text("half")
    failed = state_of(folder)
    assert failed["status"] == "failed"
    with open_run(folder, "caption", dict(reversed(ARGUMENTS.items())), [source]) as run:
        assert not run.complete
        assert state_of(folder)["status"] == "running"
        assert (folder / "part.jsonl").read_text() == "half"
        run.finish(folder)
    assert state_of(folder)["started"] == failed["started"]


def test_an_interrupted_run_is_failed_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run", "caption", ARGUMENTS, []):
        raise KeyboardInterrupt
    assert state_of(tmp_path / "run")["status"] == "failed"


def test_the_time_of_all_attempts_adds_up(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        run.began -= 100
        run.save("failed")
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        run.began -= 20
        run.finish(folder)
    assert 120 <= state_of(folder)["seconds"] < 130


def test_a_complete_run_is_recognised_and_stays_complete_whatever_happens_next(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        run.finish(folder, records=2)
    before = (folder / "run.json").read_bytes()
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        assert run.complete
    with pytest.raises(FileNotFoundError), open_run(folder, "caption", ARGUMENTS, []):
        (tmp_path / "absent").read_text()
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "arguments", "difference"),
    [
        ("caption", {**ARGUMENTS, "temperature": 0.8}, "temperature was 0.7, now 0.8"),
        ("caption", {**ARGUMENTS, "styles": ["a"]}, "styles was ['a', 'b'], now ['a']"),
        ("caption", {**ARGUMENTS, "seed": 1}, "seed was None, now 1"),
        ("caption", {"model": "toy", "temperature": 0.7}, "styles was ['a', 'b'], now None"),
        ("reason", ARGUMENTS, "stage was 'caption', now 'reason'"),
    ],
)
def test_other_arguments_are_refused_naming_the_difference(tmp_path, stage, arguments, difference):
    folder = tmp_path / "run"
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        run.finish(folder)
    message = refusal(folder, stage, arguments)
    assert difference in message
    assert str(folder) in message
    assert "Fix: " in message


def test_arguments_that_json_cannot_hold_are_compared_as_text(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        with open_run(folder, "caption", {"path": Path("a/b"), "size": (1, 2)}, []):
            pass
    assert state_of(folder)["arguments"] == {"path": "a/b", "size": [1, 2]}


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    assert "'thesis.txt'" in refusal(folder)
    assert {entry.name for entry in folder.iterdir()} <= {"thesis.txt", ".lock"}
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_kill_before_the_first_state_was_written_does_not_spoil_the_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text("process 4711 on elsewhere\n")
    (folder / "run.json.4711.tmp").write_text('{"status": "run')
    with open_run(folder, "caption", ARGUMENTS, []) as run:
        run.finish(folder)
    assert state_of(folder)["status"] == "complete"


def test_a_damaged_state_is_refused_with_the_fix(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": ')
    assert "is damaged" in refusal(folder)


def test_a_changed_input_is_refused(tmp_path, source):
    folder = tmp_path / "run"
    with open_run(folder, "caption", ARGUMENTS, [source]):
        (folder / "output.jsonl").touch()
    source.write_text('{"id": "2"}\n')
    assert f"{source} changed since the run" in refusal(folder, inputs=[source])


def test_a_missing_input_is_refused_before_anything_is_recorded(tmp_path):
    folder = tmp_path / "run"
    assert "absent.jsonl does not exist" in refusal(folder, inputs=[tmp_path / "absent.jsonl"])
    assert not (folder / "run.json").exists()


def test_the_fingerprint_of_a_folder_sees_names_and_bytes_but_not_the_run_record(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(3 << 20))
    first = fingerprint(folder)
    (folder / "run.json").write_text("{}")
    (folder / ".lock").write_text("process 1")
    assert fingerprint(folder) == first
    (folder / "config.json").write_text("[]")
    changed = fingerprint(folder)
    (folder / "config.json").write_text("{}")
    (folder / "config.json").rename(folder / "configs.json")
    renamed = fingerprint(folder)
    (folder / "configs.json").rename(folder / "config.json")
    (folder / "weights").write_bytes(bytes((3 << 20) + 1))
    assert len({first, changed, renamed, fingerprint(folder)}) == 4


def test_a_run_error_is_the_users_to_fix():
    assert issubclass(RunError, UserError)


HOLDER = """
import sys
from llava.runs import open_run
with open_run(sys.argv[1], "caption", {"model": "toy"}, []):
    print("open", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """A process that has opened `folder` and keeps it until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert holder.stdout.readline() == "open\n"
    return holder


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path):
    folder = tmp_path / "run"
    holder = hold(folder)
    try:
        message = refusal(folder, arguments={"model": "toy"})
        assert f"{folder} is in use by process {holder.pid} on {os.uname().nodename}" in message
        assert "Fix: wait, or stop it" in message
    finally:
        holder.communicate()
    assert holder.returncode == 0
    with open_run(folder, "caption", {"model": "toy"}, []) as run:
        assert not run.complete


def test_a_killed_holder_frees_the_folder_and_the_run_continues(tmp_path):
    folder = tmp_path / "run"
    holder = hold(folder)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    assert state_of(folder)["status"] == "running"
    with open_run(folder, "caption", {"model": "toy"}, []) as run:
        assert not run.complete
        run.finish(folder)
    assert state_of(folder)["status"] == "complete"


def test_the_lock_is_not_inherited_by_programs_that_a_run_starts(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, "caption", {"model": "toy"}, []):
        command = [sys.executable, "-c", "print(flush=True); input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout.readline() == b"\n"
    try:
        with open_run(folder, "caption", {"model": "toy"}, []) as run:
            assert not run.complete
    finally:
        child.communicate(b"\n")


def test_a_run_that_wrote_nothing_keeps_nobody_out(tmp_path, source):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError), open_run(folder, "caption", ARGUMENTS, [source]):
        raise RuntimeError("a typo in the arguments")
    with open_run(folder, "caption", {**ARGUMENTS, "corrected": True}, [source]) as run:
        assert run.state["arguments"]["corrected"] is True


def test_other_ranks_join_this_run_and_no_other(tmp_path, source, monkeypatch):
    from llava import runs

    monkeypatch.setattr(runs, "PATIENCE", 0.5)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="rank 0 did not open the run"):
        runs.join_run(folder, "caption", ARGUMENTS, [source])
    with open_run(folder, "caption", ARGUMENTS, [source]) as run:
        assert runs.join_run(folder, "caption", ARGUMENTS, [source]) is False
        with pytest.raises(RunError, match="belongs to another run"):
            runs.join_run(folder, "caption", {**ARGUMENTS, "other": 1}, [source])
        run.finish(folder / "x")
    assert runs.join_run(folder, "caption", ARGUMENTS, [source]) is True
