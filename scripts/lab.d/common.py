"""What every part of the lab shares: where things lie, how steps are shown, how work is made atomic."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LAB = Path(os.environ.get("KSTUB_LAB") or Path.home() / ".cache/kstub-lab").absolute()
CHECKOUT = Path(__file__).resolve().parents[2]
STAMP = ".stamp"


class LabError(Exception):
    """A step that failed: what went wrong, and what the reader can do about it."""

    def __init__(self, problem, cure):
        super().__init__(problem)
        self.cure = cure


def say(text):
    print(text, flush=True)


@contextlib.contextmanager
def step(title):
    """Shows a step and how long it took, also when it fails."""
    say(f"==> {title}")
    start = time.monotonic()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        say(f"    {title}: {outcome} in {time.monotonic() - start:.1f} s")


def note_progress(line):
    """Appends a line to $LAB/PROGRESS, for whoever waits for a set."""
    with open(LAB / "PROGRESS", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def run(argv, cure="see the message above", **options):
    """Runs a program; when it fails, its last lines become the error."""
    argv = [str(word) for word in argv]
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.STDOUT)
    try:
        result = subprocess.run(argv, text=True, errors="replace", check=False, **options)
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed", "run: scripts/lab packages") from error
    if result.returncode != 0:
        output = "\n".join(((result.stdout or "") + (result.stderr or "")).splitlines()[-40:])
        raise LabError(f"{' '.join(argv)} failed ({result.returncode}):\n{output}", cure)
    return result.stdout


def recipe_hash(*parts):
    """One hash over strings and files: the recipe of an output. A changed recipe makes it anew."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def is_current(directory, stamp):
    path = directory / STAMP
    return path.is_file() and path.read_text(encoding="utf-8") == stamp


@contextlib.contextmanager
def fresh_directory(final, stamp, keep_failed=False):
    """Yields a directory that takes the place of `final` only when the block succeeds.

    With `keep_failed` a half-made directory stays as `<name>.failed`, since that is where
    the console log of a guest that did not boot is found.
    """
    work = final.with_name(f".{final.name}.new")
    failed = final.with_name(f"{final.name}.failed")
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in (work, failed):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    except BaseException as error:
        if keep_failed:
            work.rename(failed)
        else:
            shutil.rmtree(work)
        if isinstance(error, LabError):
            error.cure = error.cure.replace(str(work), str(failed))
        raise
    (work / STAMP).write_text(stamp, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def make_sparse(path):
    """Gives back the blocks that hold only zeros: most of a guest's memory."""
    run(["fallocate", "--dig-holes", path])


def warn(text):
    print(f"    warning: {text}", file=sys.stderr, flush=True)
