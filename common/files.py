"""Output files that are complete or absent, what made them, flags' types, one-line errors."""

import argparse
import ast
import fcntl
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from math import inf
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = ".unfinished"  # ends the names of files that are being written
SHOW = ("common/tables.py", "common/figure.py", "common/pictures.py", "common/toy.py")
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "imagehash", "scikit-learn", "pydicom")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


# --- Scripts: flags and errors.


def fail(message):
    """Stop the script with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def run_script(main):
    """Run a script's main(); Ctrl-C ends it with one line, since everything finished is on disk."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: start it again with the same command and it goes on") from None


class Flags(argparse.ArgumentParser):
    """An argument parser whose help keeps the docstring's lines and whose errors are one line."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **more):
        super().__init__(formatter_class=formatter_class, **more)

    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


def number(kind=float, least=-inf, most=inf):
    """The `type` of a flag: an int or a float within these limits."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} to {most}")
        return value

    parse.__name__ = "number"  # as argparse calls it
    return parse


# --- Files: complete or absent.


@contextmanager
def exclusive(folder):
    """Work alone in a folder: stop with one line if another run works there.

    A killed run holds no lock; the files that it was writing are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        fail(f"{folder}: {error.strerror}")
    with lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder}: another run is at work there: wait for it, or give another folder")
        for unfinished in folder.glob("*" + UNFINISHED):
            unfinished.unlink()
        yield


def flock(file, operation):
    """fcntl.flock; on a file system without locks it warns, and the run goes on."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:  # another process holds the lock
        raise
    except OSError as error:
        why = f"this file system has no locks ({error.strerror})"
        print(f"warning: {file.name}: {why}: do not start two runs here", file=sys.stderr)


@contextmanager
def atomic_write(path, text=False):
    """Open a temporary file beside path; rename it to path at the end, remove it on an error."""
    path = Path(path)
    temporary = path.with_name(path.name + UNFINISHED)
    form = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"} if text else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w" if text else "wb", **form) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{error.filename or path}: {error.strerror or error}")
    finally:
        temporary.unlink(missing_ok=True)


def append_lines(path, text, head=""):
    """Append whole lines to a file that several processes write to; `head` comes first of all.

    What a killed process, or a full disk, left of a line is taken away.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write((text if whole else head + text).encode())
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def whole_lines(path):
    """The lines of a file that append_lines wrote; none where there is no file."""
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def read_json(path, lines=False):
    """The object of a JSON file, or the list of those in its lines; one line if it is damaged."""
    try:
        if lines:
            return [json.loads(line) for line in whole_lines(path)]
        return json.loads(path.read_text())
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError:
        fail(f"{path}: damaged: delete it, and make it again")


# --- What made a product: its settings, and the code that had a part in it.


def code(*but):
    """{file: digest} of the project's files that the running script has imported.

    Less those that only show what was made, and those named, which have no part in a product.
    """
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    files = [Path(file).resolve() for file in files if "site-packages" not in file]
    ours = {file.relative_to(ROOT).as_posix() for file in files if file.is_relative_to(ROOT)}
    names = [name for name in ours if name.endswith(".py") and "lib/python3." not in name]
    return {name: digest(name) for name in sorted({*names} - {*SHOW, *but}) if digest(name)}


@cache
def digest(name):
    """8 hex digits of a file's code, without comments and docstrings; None where it is gone."""
    try:
        tree = ast.parse((ROOT / name).read_text())
    except OSError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


def refuse_other(product, made, settings, remedy):
    """Stop with one line, which names what differs, if a product was made otherwise.

    made: what it recorded, {"settings": {name: value}, "code": code()}. settings: today's.
    """
    try:
        before = made["settings"] | made["code"]
        now = settings | {name: digest(name) for name in made["code"]}
    except (KeyError, TypeError):
        fail(f"{product}: does not say what made it: {remedy}")
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if changed:
        fail(f"{product}: was made otherwise ({', '.join(changed)}): {remedy}")


def versions():
    """Versions of the packages that decide the results."""
    return {name: version(name) for name in PACKAGES}
