"""Digests of code, locks, and files that are complete or absent."""

import fcntl

import pytest

from common import files

SOURCE = '''
"""A module."""
LIMIT = 3


def keep(values, name=None):
    """What it does."""
    text = f"{len(values):>{LIMIT}} of {name}"  # why
    return [value for value in values if value > LIMIT], text
'''


def test_a_digest_ignores_comments_layout_and_docstrings_only():
    """The digits are the same on Python 3.11 to 3.13, on which this was tried."""
    assert files.syntax_digest(SOURCE) == "8c49f9a1"
    same = SOURCE.replace("  # why", "").replace("A module.", "Other words.").replace("\n\n", "\n")
    assert files.syntax_digest(same) == files.syntax_digest(SOURCE)
    edits = [
        ("3", "4"),
        (">", ">="),
        ("None", '""'),
        ("None", "0"),
        ("None", "False"),
        (" of ", ""),
    ]
    digests = {files.syntax_digest(SOURCE.replace(old, new, 1)) for old, new in edits}
    assert len(digests) == len(edits) and files.syntax_digest(SOURCE) not in digests


def test_check_code_names_the_file_and_what_to_do():
    before = {"a.py": "1", "b.py": "2"}
    files.check_code("RUN", before, before, "delete it")
    with pytest.raises(SystemExit, match="RUN: was made by another version of b.py: delete it"):
        files.check_code("RUN", before, {"a.py": "1", "b.py": "3"}, "delete it")
    with pytest.raises(SystemExit, match="another version of a.py"):
        files.check_code("RUN", None, {"a.py": "1"}, "delete it")


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.exclusive(tmp_path / "run"), files.locked(tmp_path / "results.csv"):
        pass
    assert capsys.readouterr().err.count("this file system has no locks") == 2


def test_an_atomic_write_is_complete_or_absent(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path, text=True) as file:
        file.write("first")
    with pytest.raises(ValueError):
        with files.atomic_write(path, text=True) as file:
            file.write("second")
            raise ValueError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
