"""Our side of every part of tests/benchmark.py, tiny: it runs and prints."""

import pytest

from common import toy


@pytest.mark.parametrize("part, ratios", [("reduce", 0), ("pretrain", 1)])
def test_each_part(part, ratios, here, tmp_path):
    toy.write_cohort(tmp_path, patients=2, slices=5)
    cohort = ["--dicom", tmp_path, "--volumes", tmp_path, "--slices", 12]
    tiny = ["--size", 32, "--batch-size", 4, "--rounds", 1, "--steps", 1]
    printed = here("benchmark.py", part, *cohort, *tiny, "--ours")
    assert printed.count("times as fast") == ratios
    assert printed.count("/s") == 1 + ratios
