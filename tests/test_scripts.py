"""What every script does with bad input: one line, without a traceback."""

import pytest


@pytest.mark.parametrize(
    "command, words",
    [
        (["reduce.py", "{t}/none", "{t}/o", "--strategy", "all"], "no such folder"),
        (["reduce.py", "{t}", "{t}/o", "--strategy", "all"], "lies inside"),
        (["reduce.py", "{t}/empty", "{t}/o", "--strategy", "all"], "no CT slice"),
        (["pretrain.py", "{t}/none.csv", "{t}/r"], "no such selection"),
        (
            [
                "evaluate.py",
                "toy-organ",
                "{t}/none",
                "--encoder",
                "scratch",
                "--results",
                "{t}/r.csv",
            ],
            "no such file",
        ),
        (
            [
                "evaluate.py",
                "toy-organ",
                "{t}/empty",
                "--encoder",
                "scratch",
                "--results",
                "{t}/r.csv",
            ],
            "one is needed",
        ),
        (["evaluate.py", "tables", "{t}/none.csv"], "no such file"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, stopped, command, words):
    (tmp_path / "empty").mkdir()
    assert words in stopped(*(part.format(t=tmp_path) for part in command))


def test_an_error_is_one_line_and_no_traceback(tmp_path, run):
    done = run("reduce.py", tmp_path / "none", tmp_path / "o", "--strategy", "hash", ok=False)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
