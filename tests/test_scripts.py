"""What every script does with bad input: one line, without a traceback."""

import pytest


@pytest.mark.parametrize(
    "command, message",
    [
        (["reduce.py", "none", "out", "--strategy", "hash"], "error: none: no such folder"),
        (["pretrain.py", "none.csv", "run"], "error: none.csv: no such selection"),
        (["evaluate.py", "tables", "none.csv"], "error: none.csv: no such file"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(run, command, message):
    done = run(*command, ok=False)
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
