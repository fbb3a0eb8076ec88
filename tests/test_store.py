"""The slice store, the selections beside it, near-duplicates, and the processes that decode."""

import filecmp
import json
import os
import shutil
import signal

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from common import ct, hashing, store, workers

HASH = ["--strategy", "hash", "--size", 32]


@pytest.fixture
def copied(cohort, tmp_path):
    return shutil.copytree(cohort / "store", tmp_path / "store")


def refused(path):
    """The line with which read_selection stops."""
    with pytest.raises(SystemExit) as caught:
        store.read_selection(path)
    return str(caught.value)


def test_the_store_is_reused_and_a_changed_ct_folder_is_noticed(cohort, here, stopped):
    command = ["reduce.py", cohort / "ct", cohort / "store"]
    before = (cohort / "store" / "slices.npy").stat().st_mtime_ns
    printed = here(*command, "--strategy", "every-n", "--size", 32)
    assert printed.startswith("59 slices, 3 volumes; 1 files skipped, see ")
    assert "  1 skipped: pixel data is cut short" in printed
    recorded = json.loads((cohort / "store" / "store.json").read_text())["code"]
    parts = "__init__ ct dicom files hashing store volumes workers".split()  # neither of selecting
    assert recorded.keys() == {f"common/{part}.py" for part in parts}
    assert (cohort / "store" / "slices.npy").stat().st_mtime_ns == before
    other_size = "was made otherwise (size 32 -> 48): give another OUT"
    assert other_size in stopped(*command, *HASH, "--size", 48)
    assert "(window None -> [40.0" in stopped(*command, *HASH, "--window", 40, 400)
    (cohort / "ct" / "extra.txt").touch()
    assert "(files 60 -> 61, fingerprint " in stopped(*command, *HASH)
    (cohort / "ct" / "extra.txt").unlink()
    slice_file = sorted(cohort.rglob("*.dcm"))[0]
    times = slice_file.stat()
    os.utime(slice_file)
    assert "(fingerprint " in stopped(*command, *HASH)
    os.utime(slice_file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_number_of_workers_changes_no_byte(cohort, here, tmp_path):
    here("reduce.py", cohort / "ct", tmp_path, *HASH, "--workers", 1)
    files = ["slices.npy", "slices.csv", "skipped.csv", "hash-6.csv"]
    assert filecmp.cmpfiles(tmp_path, cohort / "store", files, shallow=False)[0] == files


def test_a_damaged_store_or_one_of_other_code_is_refused(cohort, copied, stopped):
    for file, old, new, message in (
        ("slices.npy", b"NUMPY", b"", "damaged ("),
        ("slices.csv", b"\n57,", b" 57,", "differ in length"),
        ("store.json", b"{", b"", "store.json: damaged"),
        ("store.json", b'"settings"', b'"other"', "does not say what made it"),  # as older versions
        ("store.json", b'ct.py": "', b'ct.py": "1', "(common/ct.py 1"),
    ):
        whole = (copied / file).read_bytes()
        (copied / file).write_bytes(whole.replace(old, new, 1))
        assert message in refused(copied / "hash-6.csv")
        assert message in stopped("reduce.py", cohort / "ct", copied, *HASH)
        (copied / file).write_bytes(whole)


def test_folders_that_reduce_cannot_use(cohort, stopped, tmp_path):
    data, text, new = cohort / "ct", tmp_path / "text", tmp_path / "new"
    text.mkdir()
    (text / "a.txt").write_text("no image")
    for data_folder, out_folder, message in [
        (data, data / "o", "lies inside"),
        (data, cohort, "lies inside"),
        (text, new, "no CT slice found, for most files: not a DICOM file"),
    ]:
        assert message in stopped("reduce.py", data_folder, out_folder, *HASH)


def test_a_selection_that_was_edited_or_is_of_another_store_is_refused(copied, tmp_path):
    path = copied / "hash-6.csv"
    text = path.read_text()
    for old, new, message in (
        ("kept", "keep", "not a selection"),
        ("2,0,0,", "2,1,0,", "damaged"),
        ("2,0,0,", "2,0,2,", "damaged"),
        ("58,", "58,0,0,0\n59,", "damaged"),
    ):
        path.write_text(text.replace(old, new, 1))
        assert f"{path}: {message}" in refused(path)
    path.write_text(text)
    slices = (copied / "slices.csv").read_text()  # of as many slices, one of them another
    (copied / "slices.csv").write_text(slices[:-2] + ("1" if slices[-2] == "0" else "0") + "\n")
    assert f"{path}: was made otherwise (store " in refused(path)
    assert "no store beside it" in refused(shutil.copy(path, tmp_path))


def test_read_selection(cohort, here, tmp_path):
    """The slices as the files have them; the digest changes with the pixels."""
    path = cohort / "store" / "hash-6.csv"
    held, kept, representative, digest = store.read_selection(path)
    lines = list(store.read_lines(path))
    assert kept.tolist() == [int(line["row"]) for line in lines if line["kept"] == "1"]
    assert representative.tolist() == [int(line["representative"]) for line in lines]
    slices = list(store.read_lines(path.parent / "slices.csv"))
    assert [held.names[i] for i in held.volume_index] == [line["volume"] for line in slices]
    assert [f"{bits:016x}" for bits in held.hashes] == [line["dhash"] for line in slices]
    here("reduce.py", cohort / "ct", tmp_path, "--strategy", "hash", "--size", 16)
    _, same_kept, _, other_digest = store.read_selection(tmp_path / "hash-6.csv")
    assert same_kept.tolist() == kept.tolist() and other_digest != digest


def test_the_digest_of_a_store_changes_with_size_window_and_code(copied):
    made = (copied / "store.json").read_text()
    digests = {store.store_digest(copied)}
    for old, new in (
        ('size": 32', 'size": 3'),
        ('window": null', 'window": 1'),
        ('py": "', 'py": "1'),
    ):
        (copied / "store.json").write_text(made.replace(old, new, 1))
        digests.add(store.store_digest(copied))
    assert len(digests) == 4


def test_ten_warnings_are_shown_and_all_are_kept(write_dicom, tmp_path, here, capsys):
    for i in range(12):
        for z in (0, 1, 2, 5):
            tags = {"SeriesInstanceUID": f"1.2.{i}", "ImagePositionPatient": [0, 0, z]}
            write_dicom(tmp_path / "ct" / f"{i} {z}", np.arange(256).reshape(16, 16), **tags)
    here("reduce.py", tmp_path / "ct", tmp_path / "out", *HASH)
    store.report(store.read_store(tmp_path / "out"))
    shown = capsys.readouterr().err
    assert shown.count(": gaps along z: 1, the widest 3.0 mm where 1.0 mm is usual") == 10
    assert "warning: 12 such: see " in shown
    assert len(json.loads((tmp_path / "out" / "store.json").read_text())["warnings"]) == 12


def test_hashes_are_of_the_full_resolution_and_pixels_are_means(cohort):
    """The contract: dhash equals str(imagehash.dhash(...)) of the full-resolution 8-bit slice."""
    pixels = np.load(cohort / "store" / "slices.npy")
    for i, line in enumerate(store.read_lines(cohort / "store" / "slices.csv")):
        slice8 = ct.read_slice(cohort / "ct" / line["file"])
        assert line["dhash"] == str(imagehash.dhash(Image.fromarray(slice8)))
        assert np.abs(pixels[i] - slice8.reshape(32, 4, 32, 4).mean((1, 3))).max() <= 0.5


def test_pixels_are_antialiased_where_they_are_no_means_of_whole_ones(cohort):
    """128 to 48 pixels: means of 2 x 2, then as torchvision resizes."""
    file = sorted((cohort / "ct").rglob("*.dcm"))[0]
    _, pixels, _ = store.decode(("", "", file, None), cohort, 48, None)
    means = ct.read_slice(file).reshape(64, 2, 64, 2).mean((1, 3))
    expected = resize(torch.from_numpy(means)[None], [48, 48], antialias=True)[0].numpy()
    found = np.frombuffer(pixels, np.uint8).reshape(48, 48)
    assert np.abs(found - expected).max() <= 1.5  # rounded three times


def test_a_window_is_that_of_all_slices_and_pictures_are_left_out(cohort, here, tmp_path):
    data = shutil.copytree(cohort / "ct" / "patient-01", tmp_path / "ct")
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(data / "a.png")
    here("reduce.py", data, tmp_path / "out", *HASH, "--window", 40, 400)
    plain = []
    for line in store.read_lines(tmp_path / "out" / "slices.csv"):
        narrow, full = (ct.read_slice(data / line["file"], w) for w in ((40, 400), None))
        assert line["dhash"] == hashing.slice_hash(narrow)
        plain.append(line["dhash"] == hashing.slice_hash(full))
    [skipped] = store.read_lines(tmp_path / "out" / "skipped.csv")
    assert not all(plain) and "--window needs HU" in skipped["reason"]


def test_near_duplicates_are_those_of_a_slow_loop(monkeypatch):
    assert (hashing.NEAR_DUPLICATE, hashing.SAME_IMAGE) == (6, 4)  # the paper's best; ours
    monkeypatch.setattr(hashing, "BLOCK", 4)
    bits = np.random.default_rng(0).random((11, 64)) < 0.05
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    near = np.array([[(a != b).sum() <= 6 for b in bits] for a in bits])
    assert 20 < near.sum() < 110
    assert (hashing.near_duplicates(hashes, 6, hashes[3:]) == near[:, 3:]).all()
    np.fill_diagonal(near, False)
    assert (hashing.near_duplicates(hashes, 6) == near).all()


def test_results_come_in_order():
    for batch in (1, 32):
        results = workers.in_order(abs, range(-100, 0), "job", 3, batch)
        assert list(results) == list(range(100, 0, -1))


def test_a_killed_worker_gives_one_line():
    with pytest.raises(SystemExit, match="a worker process was killed"):
        list(workers.in_order(signal.raise_signal, [signal.SIGKILL], "job", 2))
