"""Files that are complete or absent, locks, flags' types, and what a product says of its making."""

import fcntl
from unittest.mock import Mock

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


def test_a_digest_ignores_comments_layout_and_docstrings_only(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)

    def digest_of(source):
        (tmp_path / "file.py").write_text(source)
        return files.digest.__wrapped__("file.py")

    expected = digest_of(SOURCE)
    same = SOURCE.replace("  # why", "").replace("A module.", "Other words.").replace("\n\n", "\n")
    assert digest_of(same) == digest_of(same.replace('    """What it does."""\n', "")) == expected
    edits = [("3", "4"), (">", ">="), ("None", "0"), ("None", "False"), (" of ", "")]
    digests = {digest_of(SOURCE.replace(old, new, 1)) for old, new in edits}
    assert len(digests) == len(edits) and expected not in digests


def test_code_names_the_imported_files_but_those_that_show():
    from common import reduction, tables  # noqa: F401

    code = files.code("common/reduction.py").keys()
    assert code >= {"common/files.py", "common/hashing.py"}
    assert not code & {"common/reduction.py", "common/tables.py"}


def test_a_product_made_otherwise_is_refused_by_what_differs():
    settings = {"size": 32, "seed": 0}
    made = {"settings": settings, "code": files.code()}
    edited = made | {"code": {"common/files.py": "12345678", "common/gone.py": "12345678"}}
    files.refuse_other("RUN", made, settings, "delete it")
    for record, wanted, message in (
        (made, settings | {"size": 64}, r"RUN: was made otherwise \(size 32 -> 64\): delete it"),
        (made, settings | {"new": 1}, "new None -> 1"),
        (made | {"settings": settings | {"old": 1}}, settings, "old 1 -> None"),
        (edited, settings, r"common/files.py 12345678 -> \w{8}, common/gone.py"),
        ({"settings": {}}, {}, "does not say what made it: delete it"),
    ):
        with pytest.raises(SystemExit, match=message):
            files.refuse_other("RUN", record, wanted, "delete it")


def test_an_atomic_write_is_complete_or_absent(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path, text=True) as file:
        file.write("first")
    with pytest.raises(ValueError), files.atomic_write(path, text=True) as file:
        file.write("second")
        raise ValueError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_line_goes(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a":')
    assert files.read_json(path, lines=True) == [{"a": 1}]
    files.append_lines(path, '{"a": 2}\n')
    assert files.read_json(path, lines=True) == [{"a": 1}, {"a": 2}]
    path.write_text("nonsense\n")
    with pytest.raises(SystemExit, match="lines.jsonl: damaged"):
        files.read_json(path, lines=True)


def test_two_cannot_work_in_one_folder(tmp_path):
    with files.exclusive(tmp_path / "run"):
        with pytest.raises(SystemExit, match="another run is at work there"):
            files.exclusive(tmp_path / "run").__enter__()


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(95, "Operation not supported")))
    with files.exclusive(tmp_path / "run"):
        files.append_lines(tmp_path / "results.csv", "a line\n")
    assert capsys.readouterr().err.count("this file system has no locks") == 2


def test_a_flag_outside_of_its_limits_is_one_line():
    flags = files.Flags(prog="script.py")
    flags.add_argument("--share", type=files.number(least=1e-9, most=1))
    assert flags.parse_args(["--share", "0.01"]).share == 0.01
    for value in ("0", "1.01", "nan"):
        with pytest.raises(SystemExit, match=f"--share: {value}: must be .*see script.py --help"):
            flags.parse_args(["--share", value])
