"""Every subcommand of tests/benchmark.py, tiny.

Stand-ins replace the packages that only the plain ways need; so these run in this process.
"""

import json
import sys
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image

from common import similarity, toy

NETWORK = ["--arch", "resnet18", "--size", 32, "--batch-size", 4, "--rounds", 1, "--steps", 1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Few slices, and the plain ways in this process, as through JSON."""

    def run_here(name, *arguments):
        return json.loads(json.dumps(benchmark.HIDDEN[name](*map(str, arguments))))

    monkeypatch.setattr(benchmark, "run_plain", run_here)
    monkeypatch.setattr(benchmark, "SLICES", 20)
    monkeypatch.setattr(benchmark, "PAIRS", 5)
    monkeypatch.setattr(benchmark, "PET_CT", 6000)
    monkeypatch.setattr(benchmark, "PET_CT_VOLUMES", 10)


@pytest.fixture
def cohort(tmp_path):
    toy.write_cohort(tmp_path / "ct", patients=2, slices=5)
    return tmp_path / "ct"


def stand_in(monkeypatch, module, **contents):
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**contents))


def test_reduce(here, monkeypatch, cohort):
    def normalize(hu, _, low, high, kind):
        return np.interp(hu, [hu.min(), hu.max()], [low, high])

    def imwrite(path, grey):
        Image.fromarray(grey).save(path)

    def structural_similarity(a, b, **settings):
        return similarity.plain_ssim(a, b)

    stand_in(monkeypatch, "cv2", NORM_MINMAX=32, normalize=normalize, imwrite=imwrite)
    stand_in(monkeypatch, "skimage")
    stand_in(monkeypatch, "skimage.metrics", structural_similarity=structural_similarity)
    printed = here("benchmark.py", "reduce", "--dicom", cohort, "--volumes", cohort, "--rounds", 1)
    assert "same selection: yes" in printed
    assert printed.count("times as fast") == 3
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "largest" in line]
    assert len(differences) == 2 and max(differences) < 1e-5
    assert "6000 made-up hashes" in printed


class Pictures(torch.utils.data.Dataset):
    """For lightly's data set: two views of each picture of a folder, a label, and its name."""

    def __init__(self, folder, transform):
        self.files = sorted(benchmark.Path(folder).iterdir())
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(Image.open(self.files[i])), 0, self.files[i].name


def two_views(input_size):
    def transform(image):
        view = torch.full((3, input_size, input_size), image.getpixel((0, 0)) / 255)
        return view, 1 - view

    return transform


def test_pretrain(here, monkeypatch, cohort):
    def criterion():
        return torch.nn.MSELoss()

    def head(width, hidden, projection_dim):
        return torch.nn.Linear(width, projection_dim)

    stand_in(monkeypatch, "lightly.data", LightlyDataset=Pictures)
    stand_in(monkeypatch, "lightly.loss", NTXentLoss=criterion)
    stand_in(monkeypatch, "lightly.models.modules", SimCLRProjectionHead=head)
    stand_in(monkeypatch, "lightly.transforms", SimCLRTransform=two_views)
    printed = here("benchmark.py", "pretrain", "--volumes", cohort, *NETWORK)
    assert printed.count("times as fast") == 3


def test_evaluate(here):
    printed = here("benchmark.py", "evaluate", *NETWORK)
    assert printed.count("times as fast") == 1
