"""Output files that are either whole or absent, one run at a time in a folder, and errors that are one line."""

import csv
import fcntl
import os
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

UNFINISHED = ".unfinished"  # ends the names of files that are being written


def fail(message):
    """Stop the script with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def run_script(main):
    """Run a script's main(); Ctrl-C ends it with one line, since everything finished is on disk."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(
            errors="backslashreplace"
        )  # names that are not UTF-8 must not stop a run
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: start it again with the same command and it goes on") from None


@contextmanager
def only_one(folder):
    """Stop with one line if another run works in folder; a killed run leaves no lock behind. Removes what it was writing."""
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        fail(f"{folder}: {error.strerror}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{folder}: another run is at work there: wait for it, or give another folder")
        try:
            for old in folder.glob("*" + UNFINISHED):
                old.unlink()
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if new and not any(folder.iterdir()):  # stopped before anything was made
                folder.rmdir()


@contextmanager
def whole_file(path, text=False):
    """Open a temporary file beside path for writing; rename it to path at the end of the block, or remove it on an error."""
    path = Path(path)
    temporary = path.with_name(path.name + UNFINISHED)
    mode = (
        {"mode": "w", "newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        if text
        else {"mode": "wb"}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, **mode) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"{error.filename or path}: {error.strerror or error}")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_line(file, cells):
    """One line of a CSV file. csv quotes what it must, but for a lone carriage return, which a file's name may hold."""
    quoting = csv.QUOTE_ALL if any("\r" in str(cell) for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator="\n", quoting=quoting).writerow(cells)


def versions():
    """Versions of the packages that decide the results."""
    names = ["torch", "torchvision", "numpy", "pillow", "imagehash", "scikit-learn", "pydicom"]
    return {name: version(name) for name in names}
