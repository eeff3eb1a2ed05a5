"""A run: one folder with its outputs and `run.json`, which says what made them. Standard library only.

`run.json` holds stage, status (`running`, `complete`, `failed`, `preempted`), resolved arguments, input fingerprints, counts,
versions, git commit, device, times. A folder belongs to one run: the same command again continues it or finds it
complete; other arguments are refused. One process at a time holds the folder's lock; the kernel frees it on death.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.records import sha256_of, write_json

PATIENCE = 300  # seconds that a rank waits for rank 0
PREEMPTED = 75  # exit status of a run that was asked to leave and can be continued (EX_TEMPFAIL of sysexits.h)
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "deepspeed", "numpy", "pillow")


class RunError(UserError):
    """A run folder that cannot be used."""


def rank() -> int:
    """This process's number among all of the job (torchrun's RANK)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class Preempted(Exception):
    """The run was asked to leave (SIGTERM, SIGUSR1) and saved what it has; the same command continues it."""


class Run:
    """An open run folder. Use `open_run`."""

    def __init__(self, folder: Path, stage: str, state: dict[str, Any]):
        self.folder, self.stage, self.state = folder, stage, state
        self.earlier, self.began = state.get("seconds", 0.0), time.time()
        self.counts: dict[str, int] = {}

    @property
    def complete(self) -> bool:
        return self.state["status"] == "complete"

    def save(self, status: str) -> None:
        seconds = round(self.earlier + time.time() - self.began, 1)
        self.state.update(status=status, counts=self.counts, seconds=seconds, saved=time.time())
        write_json(self.folder / "run.json", self.state)

    def finish(self, output: Path, **counts: int) -> None:
        """Mark the run complete and print its one line: counts in and out, duration, where the output is."""
        self.counts.update(counts)
        self.save("complete")
        print_stage(self.stage, self.counts, time.time() - self.began, output)


def print_stage(stage: str, counts: dict[str, int], seconds: float, output: Path) -> None:
    numbers = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    print(f"[{stage}] {numbers}, {seconds:.0f} s -> {output}", flush=True)


@contextmanager
def open_run(folder: str | Path, stage: str, arguments: dict[str, Any], inputs: list[str | Path]):
    """Open `folder` for this stage, or refuse it.

    Args:
        folder: created when absent.
        stage: name of the stage, part of the run's identity.
        arguments: what determines the output. The same arguments continue the run; others are refused.
        inputs: files and folders whose fingerprints are recorded, and compared when a run is continued.

    Raises:
        RunError: the folder holds another run or unknown files, another process has it, or an input changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        identity = {"stage": stage, "arguments": plain(arguments)}
        fingerprints = {str(path): fingerprint(Path(path)) for path in inputs}
        state = read_state(folder)
        if state is not None:
            try:
                refuse_other_run(folder, state, identity, fingerprints)
            except RunError:
                if state["status"] == "complete" or not is_untouched(folder):
                    raise
                state = None  # a run that failed before it wrote anything keeps nobody out
        if state is None:
            state = {"status": "running", **identity, "inputs": fingerprints, **environment(), "started": time.time()}
        run = Run(folder, stage, state)
        if not run.complete:
            run.save("running")
        try:
            yield run
        except Preempted:
            run.save("preempted")
            raise
        except BaseException:
            if not run.complete:
                run.save("failed")
            raise


def join_run(folder: str | Path, stage: str, arguments: dict[str, Any], inputs: list[str | Path]) -> bool:
    """What the other ranks do while rank 0 opens the run: wait until it is theirs; True when it is complete.

    Raises RunError when rank 0 does not open this very run within `PATIENCE` seconds.
    """
    folder = Path(folder)
    identity = {"stage": stage, "arguments": plain(arguments)}
    fingerprints = {str(path): fingerprint(Path(path)) for path in inputs}
    deadline = time.time() + PATIENCE
    while True:
        try:
            state = json.loads((folder / "run.json").read_text())
            refuse_other_run(folder, state, identity, fingerprints)
            return state["status"] == "complete"
        except (FileNotFoundError, RunError) as error:
            if time.time() > deadline:
                raise RunError(
                    f"rank 0 did not open the run in {folder}: {error}. Fix: look at rank 0's message"
                ) from error
            time.sleep(0.2)


def is_untouched(folder: Path) -> bool:
    """Nothing but run.json and the lock: a run that failed before it wrote anything."""
    return all(entry.name in ("run.json", ".lock") for entry in folder.iterdir())


def read_state(folder: Path) -> dict[str, Any] | None:
    """The folder's run.json, None for an empty folder. Raises RunError when it holds files of something else."""
    path = folder / "run.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}). Fix: delete the folder {folder}, or name another") from error
    ours = re.compile(r"\.lock|run\.json\.\d+\.tmp")  # the second: a kill during the very first save
    strangers = [entry.name for entry in folder.iterdir() if not ours.fullmatch(entry.name)]
    if strangers:
        raise RunError(
            f"output folder {folder} already holds {strangers[0]!r}, which no run of this pipeline recorded. "
            "Fix: name an empty or new folder"
        )
    return None


def refuse_other_run(folder: Path, state: dict, identity: dict, fingerprints: dict[str, str]) -> None:
    old = {"stage": state["stage"], **state["arguments"]}
    new = {"stage": identity["stage"], **identity["arguments"]}
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        key = differing[0]
        raise RunError(
            f"output folder {folder} belongs to another run: {key} was {old.get(key)!r}, now {new.get(key)!r}. "
            "Fix: name another folder, or delete this one"
        )
    for path, digest in fingerprints.items():
        if path in state["inputs"] and state["inputs"][path] != digest:
            raise RunError(
                f"{path} changed since the run in {folder} started. Fix: name another folder, or delete this one"
            )


@contextmanager
def lock(folder: Path):
    """Hold `folder/.lock` while the block runs. Raises RunError naming the holder."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"the file system of {folder} has no file locks ({error.strerror}). Fix: write elsewhere"
                ) from error
            holder = os.read(handle, 200).decode(errors="replace").strip()
            raise RunError(f"{folder} is in use by {holder or 'another process'}. Fix: wait, or stop it") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON would give them back."""
    return json.loads(json.dumps(arguments, default=str))


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": [sys.executable, *sys.argv],
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": git_commit(),
        "host": os.uname().nodename,
        "world_size": world_size(),
    }


def git_commit() -> str | None:
    """The commit of this checkout, with a plus sign when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def fingerprint(path: Path) -> str:
    """Short hash of a file's bytes, or of a checkpoint folder: names, sizes, small files whole, large ones sampled.

    Raises RunError when the path does not exist.
    """
    if path.is_file():
        return sha256_of(path)[:16]
    if not path.is_dir():
        raise RunError(f"{path} does not exist. Fix: check the path")
    digest = hashlib.sha256()
    own = {"run.json", ".lock"}
    for file in sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name not in own):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for offset in [0] if size < 1 << 20 else range(0, size, max(size // 64, 1)):
                stream.seek(offset)
                digest.update(stream.read(1 << 20 if size < 1 << 20 else 4096))
    return digest.hexdigest()[:16]
