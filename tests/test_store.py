"""The slice store, the selections beside it, near-duplicates, and the processes that decode."""

import csv
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count

import imagehash
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from common import ct, hashing, store, toy, workers
from common.files import exclusive

HASH = ["--strategy", "hash", "--size", 32]


def make_store(folder, run):
    """ct/ of 3 toy patients with one file cut short, store/ with hash-6; returns what it prints."""
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    return run("reduce.py", folder / "ct", folder / "store", *HASH).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("made")
    return folder, make_store(folder, run)


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[0] / "store", tmp_path / "store")


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def refused(path):
    """The line with which read_selection stops."""
    with pytest.raises(SystemExit) as caught:
        store.read_selection(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_store_is_reused_and_a_changed_ct_folder_is_noticed(made, here, stopped):
    folder, printed = made
    command = ["reduce.py", folder / "ct", folder / "store"]
    before = (folder / "store" / "slices.npy").stat().st_mtime_ns
    again = here(*command, "--strategy", "all", "--size", 32)
    assert again.splitlines()[:2] == printed.splitlines()[:2]
    assert printed.startswith("59 slices of 3 volumes; 1 file skipped, see ")
    assert "  1 skipped: pixel data is cut short" in printed
    recorded = json.loads((folder / "store" / "store.json").read_text())["code"]
    assert not {"reduce.py", "common/reduction.py"} & recorded.keys()
    assert (folder / "store" / "slices.npy").stat().st_mtime_ns == before
    other_size = stopped(*command, "--strategy", "all", "--size", 48)
    assert "was made otherwise (size 32 -> 48): give another OUT" in other_size
    assert "(window None -> [40.0" in stopped(*command, *HASH, "--window", 40, 400)
    (folder / "ct" / "extra.txt").touch()
    assert "(files 60 -> 61, fingerprint " in stopped(*command, *HASH)
    (folder / "ct" / "extra.txt").unlink()
    slice_file = sorted(folder.rglob("*.dcm"))[0]
    times = slice_file.stat()
    os.utime(slice_file)
    assert "(fingerprint " in stopped(*command, *HASH)
    os.utime(slice_file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["slices.npy", "slices.csv", "skipped.csv", "hash-6.csv"])
def test_the_number_of_workers_changes_no_byte(made, here, name):
    folder = made[0]
    here("reduce.py", folder / "ct", folder / "store1", *HASH, "--workers", 1)
    assert filecmp.cmp(folder / "store1" / name, folder / "store" / name, shallow=False)


@pytest.mark.parametrize(
    "file, harm, message",
    [
        ("slices.npy", lambda whole: whole[:-1], "damaged ("),
        ("slices.npy", lambda whole: b"", "damaged ("),
        ("slices.npy", None, "No such file"),
        ("slices.csv", lambda whole: whole[: whole[:-1].rindex(b"\n") + 1], "differ in length"),
        ("store.json", lambda whole: b"{", "store.json: damaged"),
        ("store.json", lambda whole: b"{}", "does not say what made it"),  # as of older versions
        ("store.json", lambda whole: whole.replace(b'ct.py": "', b'ct.py": "1'), "(common/ct.py 1"),
    ],
)
def test_a_damaged_store_or_one_of_other_code_is_refused(
    made, copied, stopped, file, harm, message
):
    whole = (copied / file).read_bytes()
    (copied / file).unlink()
    if harm:
        (copied / file).write_bytes(harm(whole))
    assert message in refused(copied / "hash-6.csv")
    assert message in stopped("reduce.py", made[0] / "ct", copied, *HASH)


def test_folders_that_reduce_cannot_use(made, stopped, tmp_path):
    data, out, text, new = made[0] / "ct", made[0] / "store", tmp_path / "text", tmp_path / "new"
    text.mkdir()
    (text / "a.txt").write_text("no image")
    for data_folder, out_folder, message in [
        (tmp_path / "none", new, "no such folder"),
        (data, text / "a.txt" / "o", "Not a directory"),
        (data, text / "a.txt", "File exists"),
        (data, data / "o", "lies inside"),
        (data, made[0], "lies inside"),
        (text, out, "was made otherwise"),
        (text, new, "no CT slice found, for most files: not a DICOM file"),
    ]:
        assert message in stopped("reduce.py", data_folder, out_folder, *HASH)
        assert not new.exists()
    with exclusive(out):
        assert "another run" in stopped("reduce.py", data, out, *HASH)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kept", "keep", "not a selection"),
        ("2,0,0,", "2,no,0,", "not a selection"),
        ("2,0,0,", "2,1,0,", "damaged"),
        ("2,0,0,", "2,0,2,", "damaged"),
        ("58,", "58,0,0,0\n59,", "damaged"),
        ("0,1,0,0\n", "", "damaged"),
    ],
)
def test_a_selection_that_was_edited_is_refused(copied, old, new, message):
    path = copied / "hash-6.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert f"{path}: {message}" in refused(path)


def test_a_selection_is_known_by_its_own_store(made, copied, run, tmp_path):
    """Of as many slices and of the same names: their hashes tell stores apart."""
    data = shutil.copytree(made[0] / "ct", tmp_path / "ct")
    first, second = sorted(data.rglob("*.dcm"))[:2]
    pixels = second.read_bytes()[-20000:]
    first.write_bytes(first.read_bytes()[:-20000] + pixels)
    run("reduce.py", data, tmp_path / "out", *HASH)
    shutil.copy(copied / "hash-6.csv", tmp_path / "out")
    shutil.copy(copied / "hash-6.json", tmp_path / "out")
    assert "was made otherwise (store " in refused(tmp_path / "out" / "hash-6.csv")
    assert "no store beside it" in refused(shutil.copy(copied / "hash-6.csv", tmp_path))


def test_read_selection(made, here, tmp_path):
    """The slices as the files have them; the digest changes with the pixels."""
    path = made[0] / "store" / "hash-6.csv"
    held, kept, representative, digest = store.read_selection(path)
    lines = table(path)
    assert kept.tolist() == [int(line["row"]) for line in lines if line["kept"] == "1"]
    assert representative.tolist() == [int(line["representative"]) for line in lines]
    slices = table(path.parent / "slices.csv")
    assert [held.names[i] for i in held.volume_index] == [line["volume"] for line in slices]
    assert [f"{bits:016x}" for bits in held.hashes] == [line["dhash"] for line in slices]
    here("reduce.py", made[0] / "ct", tmp_path, "--strategy", "hash", "--size", 16)
    _, same_kept, _, other_digest = store.read_selection(tmp_path / "hash-6.csv")
    assert same_kept.tolist() == kept.tolist() and other_digest != digest


def test_ten_warnings_are_shown_and_all_are_kept(write_dicom, tmp_path, here, capsys):
    for i in range(12):
        for z in (0, 1, 2, 5):
            tags = {"SeriesInstanceUID": f"1.2.{i}", "ImagePositionPatient": [0, 0, z]}
            write_dicom(tmp_path / "ct" / f"{i} {z}", np.eye(16, dtype=int), **tags)
    here("reduce.py", tmp_path / "ct", tmp_path / "out", *HASH)
    store.report(store.read_store(tmp_path / "out"))
    shown = capsys.readouterr().err
    assert shown.count(": gaps along z: 1, the widest 3.0 mm where 1.0 mm is usual") == 10
    assert "warning: 12 such: see " in shown
    assert len(json.loads((tmp_path / "out" / "store.json").read_text())["warnings"]) == 12


def test_hashes_are_of_the_full_resolution_and_pixels_are_means(made):
    """The contract: dhash equals str(imagehash.dhash(...)) of the full-resolution 8-bit slice."""
    pixels = np.load(made[0] / "store" / "slices.npy")
    for i, line in enumerate(table(made[0] / "store" / "slices.csv")):
        slice8 = ct.read_slice(made[0] / "ct" / line["file"])
        assert line["dhash"] == str(imagehash.dhash(Image.fromarray(slice8)))
        assert np.abs(pixels[i] - slice8.reshape(32, 4, 32, 4).mean((1, 3))).max() <= 0.5


def test_near_duplicates_are_those_of_a_slow_loop(monkeypatch):
    # the paper's best threshold; ours, by looking at pairs
    assert (hashing.NEAR_DUPLICATE, hashing.SAME_IMAGE) == (6, 4)
    monkeypatch.setattr(hashing, "BLOCK", 4)
    bits = np.random.default_rng(0).random((11, 64)) < 0.05
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    differ = np.array([[(a != b).sum() for b in bits] for a in bits])
    near = differ <= 6
    assert 20 < near.sum() < 110 and (differ == 6).any()
    assert (hashing.near_duplicates(hashes, 6, hashes[3:]) == near[:, 3:]).all()
    np.fill_diagonal(near, False)
    assert (hashing.near_duplicates(hashes, 6) == near).all()


def test_results_come_in_order_and_few_jobs_are_handed_out():
    taken = count()
    results = workers.in_order(abs, (-next(taken) for _ in range(1000)), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert next(taken) <= workers.AHEAD + 3
    results.close()
    assert list(workers.in_order(abs, range(-100, 0), 3)) == list(range(100, 0, -1))


def kill_oneself(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_gives_one_line():
    with pytest.raises(SystemExit, match="a worker process was killed"):
        list(workers.in_order(kill_oneself, range(3), 2))


def test_a_killed_reduce_leaves_no_workers(made, tmp_path):
    """They would wait for work for ever."""
    slow = (
        "import time, reduce\nfrom common import store\n"
        "def decode(job, data, size, window):\n    time.sleep(9)\n"
        "store.decode = decode\nreduce.main()"
    )
    command = [sys.executable, "-c", slow, made[0] / "ct", tmp_path / "out", *HASH]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE)
    while not list((tmp_path / "out").glob("*.unfinished")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # ends when the last process that holds its output has gone
    assert not (tmp_path / "out" / "store.json").exists()
