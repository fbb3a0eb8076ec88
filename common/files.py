"""Output files that are either whole or absent, and errors that are one line."""

import os
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path


def fail(message):
    """Stop the script with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


@contextmanager
def whole_file(path, text=False):
    """Open a temporary file beside path for writing; rename it to path at the end of the block, or remove it on an error."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    mode = {"mode": "w", "newline": "", "encoding": "utf-8", "errors": "surrogateescape"} if text else {"mode": "wb"}
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


def versions():
    """Versions of the packages that decide the results."""
    names = ["torch", "torchvision", "numpy", "pillow", "imagehash", "scikit-learn", "pydicom"]
    return {name: version(name) for name in names}
