"""Output files that are complete or absent, locks, digests of the code, one-line errors."""

import ast
import csv
import fcntl
import hashlib
import os
import sys
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = ".unfinished"  # ends the names of files that are being written


def fail(message):
    """Stop the script with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def run_script(main):
    """Run a script's main(); Ctrl-C ends it with one line, since everything finished is on disk."""
    for stream in (sys.stdout, sys.stderr):
        # file names that are not UTF-8 must not stop a run
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: start it again with the same command and it goes on") from None


@contextmanager
def exclusive(folder):
    """Work alone in a folder: stop with one line if another run works there.

    A killed run leaves no lock behind; the files that it was writing are removed.
    """
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        fail(f"{folder}: {error.strerror}")
    with lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder}: another run is at work there: wait for it, or give another folder")
        try:
            for unfinished in folder.glob("*" + UNFINISHED):
                unfinished.unlink()
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if new and not any(folder.iterdir()):  # stopped before anything was made
                folder.rmdir()


@contextmanager
def locked(path):
    """Hold path's lock file, `path.lock`, for the moment of changing path; others wait for it."""
    lock_path = Path(path).with_name(Path(path).name + ".lock")
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(lock_path, "w")
    except OSError as error:
        fail(f"{lock_path}: {error.strerror}")
    with lock:
        flock(lock, fcntl.LOCK_EX)
        yield


def flock(file, operation):
    """fcntl.flock; on a file system without locks it warns, and the run goes on."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:  # another process holds the lock
        raise
    except OSError as error:
        print(
            f"warning: {file.name}: this file system has no locks ({error.strerror}): "
            "do not start two runs on the same output",
            file=sys.stderr,
        )


@contextmanager
def atomic_write(path, text=False):
    """Open a temporary file beside path; rename it to path at the end, remove it on an error."""
    path = Path(path)
    temporary = path.with_name(path.name + UNFINISHED)
    mode = {"mode": "wb"}
    if text:
        mode = {"mode": "w", "newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
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
    """Write one line of a CSV file, also where a file's name holds a lone carriage return.

    csv itself would leave that unquoted.
    """
    quoting = csv.QUOTE_ALL if any("\r" in str(cell) for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator="\n", quoting=quoting).writerow(cells)


def versions():
    """Versions of the packages that decide the results."""
    names = ["torch", "torchvision", "numpy", "pillow", "imagehash", "scikit-learn", "pydicom"]
    return {name: version(name) for name in names}


@cache
def code_digest(*names):
    """{name: 8 hex digits} for files of this package, such as "common/simclr.py".

    A digest of the syntax tree: comments, layout and docstrings do not count, any other edit does.
    Every product records the digests of the files that decide it, so that it is never mistaken
    for one of an edited script.
    """
    return {name: syntax_digest((ROOT / name).read_text()) for name in names}


def one_digest(*names):
    """8 hex digits over the code_digest of several files."""
    return hashlib.sha256(repr(code_digest(*names)).encode()).hexdigest()[:8]


def syntax_digest(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return hashlib.sha256(repr(syntax(tree)).encode()).hexdigest()[:8]


def syntax(node):
    """A syntax tree as nested tuples, the same in every version of Python.

    ast.dump is not: newer versions have fields that are empty here, or cut f-strings otherwise.
    """
    if isinstance(node, list):
        return [syntax(item) for item in node]
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    if isinstance(node, ast.JoinedStr):
        parts = [part for part in node.values if getattr(part, "value", None) != ""]
        fields = [("values", parts)]
    return (type(node).__name__, *((name, syntax(value)) for name, value in fields))


def check_code(product, before, now, remedy):
    """Stop with one line if a product's recorded code_digest is not today's.

    remedy: what to do, such as "give another OUT, or delete this one".
    """
    before = before if isinstance(before, dict) else {}
    edited = [name for name in now if before.get(name) != now[name]]
    if edited:
        fail(f"{product}: was made by another version of {', '.join(edited)}: {remedy}")


if __name__ == "__main__":  # one digest of the named files, by which reproduce.sh notices edits
    print(one_digest(*sys.argv[1:]))
