import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import toy  # noqa: E402
from common.encoder import load_encoder  # noqa: E402


def write_covid_ct(folder, images=4):
    """COVID-CT's layout, with that many images of each class in each part of the split."""
    rng = np.random.default_rng(0)
    for kind in ("COVID", "NonCOVID"):
        pictures, lists = folder / f"CT_{kind}", folder / "Data-split" / kind
        pictures.mkdir(parents=True)
        lists.mkdir(parents=True)
        for part in ("train", "val", "test"):
            names = [f"{part}{i}-p{i}-1%0.png" for i in range(images)]
            for name in names:
                pixels = rng.integers(0, 256, (40, 30), dtype=np.uint8)
                Image.fromarray(pixels).save(pictures / name)
            (lists / f"{part}CT_{kind}.txt").write_text("\n".join(names))


@pytest.fixture
def write_dicom():
    """write_dicom(path, stored values, **tags to set, or to delete with None): one CT slice."""

    def write(path, stored, **tags):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        kind = np.int16 if np.min(stored) < 0 else np.uint16
        dataset.set_pixel_data(np.asarray(stored, kind), "MONOCHROME2", 16)  # makes its UID
        dataset.Modality, dataset.SeriesInstanceUID, dataset.InstanceNumber = "CT", "1.2.3", 1
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.ImagePositionPatient = [0, 0, 0]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        for tag, value in tags.items():
            if value is None:
                del dataset[tag]
            elif tag == "PixelPaddingValue" and value > 32767:  # as beside signed pixels
                dataset.add_new(tag, "US", value)
            else:
                setattr(dataset, tag, value)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)

    return write


@pytest.fixture(scope="session")
def run():
    """run(script and arguments): the finished process; fails the test unless `ok` fits."""

    def call(*command, ok=True, program=sys.executable):
        # a relative path, as people give it; and what other launchers leave behind
        odd = {"PYTHON": os.path.relpath(sys.executable, ROOT), "WORLD_SIZE": "2", "RANK": "1"}
        environment = os.environ | odd | {"LOCAL_RANK": "7", "OMP_NUM_THREADS": "1"}
        command = [program, *map(str, command)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
        )
        assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def cohort(tmp_path_factory, run):
    """A folder with ct/ of 3 toy patients, one file cut short, and store/ with hash-6 and all."""
    folder = tmp_path_factory.mktemp("cohort")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    for strategy in ("hash", "all"):
        flags = ["--strategy", strategy, "--size", 32]
        run("reduce.py", folder / "ct", folder / "store", *flags)
    return folder


@pytest.fixture(scope="session")
def store(cohort):
    return cohort / "store"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with the toy tasks, of fewer patients: 90, 30 and 60 images of 32 pixels."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        parts = {"train": range(6), "val": range(6, 8), "test": range(8, 12)}
        patch.setattr(toy, "PATIENTS", parts)
        toy.write_tasks(folder, size=32)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder.pt with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(load_encoder("scratch", "resnet18", 0).state_dict(), path)
    return path


@pytest.fixture
def here(monkeypatch, capsys):
    """here(script and arguments): what it prints, run in this process: no import of torch."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module(script.removesuffix(".py")).main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def stopped(here):
    """stopped(script and arguments): the one line that it ends with, run in this process."""

    def call(*command):
        with pytest.raises(SystemExit) as caught:
            here(*command)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call
