"""Output files that are either whole or absent, and errors that are one line."""

import os
from importlib.metadata import version
from pathlib import Path


def fail(message):
    """Stop the script with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def write_atomically(path, write, text=False):
    """Call write(file) on a temporary file beside path, then rename it to path; on an error nothing stays."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    mode = {"mode": "w", "newline": "", "encoding": "utf-8", "errors": "surrogateescape"} if text else {"mode": "wb"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, **mode) as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            fail(f"{path}: cannot be written: {error.strerror or error}")
        raise


def versions():
    """Versions of the packages that decide the results."""
    names = ["torch", "torchvision", "numpy", "pillow", "imagehash", "scikit-learn", "pydicom"]
    return {name: version(name) for name in names}
