"""The slice store and the selections beside it, made by the real reduce.py on toy CT."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless

from common import dicom, files, hashing, store, toy
from common.files import exclusive

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "resnet18", "--size", 16, "--batch-size", 16, "--optimizer", "adamw"]
HASH = ["--strategy", "hash", "--size", 32]


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """ct/ of 3 toy patients with one file cut short, store/ with hash-6, and what was printed."""
    folder = tmp_path_factory.mktemp("made")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    done = run("reduce.py", folder / "ct", folder / "store", *HASH)
    return folder, cut, done.stdout


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the store, with the times of the original."""
    shutil.copytree(made[0] / "store", tmp_path / "store")
    return tmp_path / "store"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_store_is_reused_and_a_changed_ct_folder_is_noticed(made, run):
    folder, _, printed = made
    data, out = folder / "ct", folder / "store"
    before = (out / "slices.npy").stat().st_mtime_ns
    done = run("reduce.py", data, out, "--strategy", "random", "--keep", 0.3, "--size", 32)
    assert "headers" not in done.stderr
    assert (out / "slices.npy").stat().st_mtime_ns == before
    kept = json.loads((out / "random-keep-0.3.json").read_text())
    assert abs(kept["kept"] - 0.3 * kept["slices"]) <= 0.5
    # what the store holds and what it left out is said again
    assert done.stdout.splitlines()[:2] == printed.splitlines()[:2]
    assert "skipped: pixel data is cut short" in done.stdout
    for changed in (["--size", 48], ["--size", 32, "--window", 40, 400]):
        done = run("reduce.py", data, out, "--strategy", "all", *changed, ok=False)
        assert "was made from other input" in done.stderr and "Traceback" not in done.stderr
    extra = data / "extra.txt"
    extra.write_text("new")
    done = run("reduce.py", data, out, "--strategy", "all", "--size", 32, ok=False)
    extra.unlink()
    assert "files of DATA" in done.stderr


def test_the_number_of_workers_changes_no_byte(made, run):
    folder = made[0]
    run("reduce.py", folder / "ct", folder / "store1", *HASH, "--workers", 1)
    for name in ("slices.npy", "slices.csv", "skipped.csv", "hash-6.csv", "hash-6.png"):
        one = store.crc32(folder / "store1" / name)
        assert one == store.crc32(folder / "store" / name), name


@pytest.fixture
def edited(monkeypatch):
    """edited(file of the package, text, its replacement): as if somebody had edited that file."""

    def edit(name, old, new):
        source = (ROOT / name).read_text()
        assert old in source
        digest = files.syntax_digest(source.replace(old, new))
        real = files.code_digest

        def digests(*names):
            return real(*names) | ({name: digest} if name in names else {})

        monkeypatch.setattr(store, "code_digest", digests)

    return edit


def test_a_store_of_other_code_is_refused_and_another_out_works(
    made, stopped, here, edited, monkeypatch, tmp_path
):
    data, out = made[0] / "ct", made[0] / "store"
    edited("common/hashing.py", "return dhash(slice8)", "return dhash(255 - slice8)")
    # for the workers, which are forked
    monkeypatch.setattr(store, "slice_hash", lambda slice8: hashing.dhash(255 - slice8))
    for line in (
        stopped("reduce.py", data, out, *HASH),
        stopped("pretrain.py", out / "hash-6.csv", tmp_path / "run", *TINY),
    ):
        assert f"{out}: was made by another version of common/hashing.py: give another OUT" in line
    here("reduce.py", data, tmp_path / "other", *HASH)
    original, other = table(out / "slices.csv"), table(tmp_path / "other" / "slices.csv")
    assert [row["file"] for row in original] == [row["file"] for row in other]
    assert [row["dhash"] for row in original] != [row["dhash"] for row in other]


def test_another_comment_or_layout_is_the_same_code(made, here, edited):
    edited("common/ct.py", "AIR_HU = -1000.0", "# air\nAIR_HU = (-1000.0)")
    assert "hash-6: kept" in here("reduce.py", made[0] / "ct", made[0] / "store", *HASH)


def test_a_decoder_installed_since_is_noticed(write_dicom, here, monkeypatch, tmp_path):
    for i in range(3):
        path = tmp_path / "ct" / f"{i}.dcm"
        write_dicom(path, np.arange(256).reshape(16, 16), ImagePositionPatient=[0, 0, i])
        if i:
            dataset = pydicom.dcmread(path)
            dataset.PixelData = encapsulate([b"\0" * 100])
            dataset["PixelData"].VR = "OB"
            dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
            dataset.save_as(path, enforce_file_format=True)
    command = ["reduce.py", tmp_path / "ct", tmp_path / "out", *HASH]
    built = here(*command)
    assert "2 skipped: JPEG-LS" in built and "pip install pylibjpeg" in built
    assert here(*command).splitlines()[:-1] == built.splitlines()[:-1]
    monkeypatch.setattr(dicom, "get_decoder", lambda syntax: SimpleNamespace(is_available=True))
    line = f"2 files skipped then can be decoded now: to take them in, delete {tmp_path / 'out'}"
    assert line in here(*command)


def test_what_lies_beside_the_ct_is_counted_as_what_it_is(write_dicom, run, tmp_path):
    for i in range(3):
        tags = {"ImagePositionPatient": [0, 0, i]}
        pixels = np.arange(256).reshape(16, 16) + i
        write_dicom(tmp_path / "ct" / f"{i}.dcm", pixels, **tags)
        tags |= {"Modality": "PT", "SeriesInstanceUID": "1.2.9"}
        write_dicom(tmp_path / "ct" / f"pet{i}.dcm", pixels, **tags)
    done = run("reduce.py", tmp_path / "ct", tmp_path / "out", *HASH)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("3 slices of 1 volume; 3 files skipped, see ")
    assert second == "  3 skipped: Modality is PT, not CT"
    assert "warning" not in done.stderr


def test_a_damaged_store_is_noticed(made, copied, stopped):
    data, array = made[0] / "ct", copied / "slices.npy"
    commands = [
        ["pretrain.py", copied / "hash-6.csv", copied / "run", *TINY],
        ["reduce.py", data, copied, *HASH],
    ]
    undamaged = array.read_bytes()
    flipped = undamaged[:5000] + bytes([undamaged[5000] ^ 1]) + undamaged[5001:]
    for harm in (flipped, undamaged[:-1], b""):
        array.write_bytes(harm)
        assert all("slices.npy: damaged" in stopped(*command) for command in commands)
    array.unlink()
    assert all("No such file" in stopped(*command) for command in commands)
    for harm in ("", "{", "[]"):
        (copied / "store.json").write_text(harm)
        assert all("store.json: damaged" in stopped(*command) for command in commands)


def test_a_store_is_read_in_full_only_after_copying_or_when_asked(made, monkeypatch, tmp_path):
    read = []
    real = store.crc32
    monkeypatch.setattr(store, "crc32", lambda path: read.append(path.name) or real(path))
    out = tmp_path / "out"
    shutil.copytree(made[0] / "store", out, copy_function=shutil.copyfile)  # with other times
    for name in store.LARGE_FILES:
        os.utime(out / name)
    store.read_store(out)
    assert read == ["slices.npy", "slices.csv"]
    store.read_store(out)
    assert len(read) == 2
    monkeypatch.setattr(sys, "argv", ["store", str(out)])
    store.main()
    assert len(read) == 4


def test_the_checksums_are_checked_when_asked(copied, run):
    """Also where size and time tell nothing."""
    done = run("-m", "common.store", copied)
    assert "undamaged" in done.stdout
    array = copied / "slices.npy"
    stat = array.stat()
    with open(array, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    os.utime(array, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = run("-m", "common.store", copied, ok=False)
    assert "slices.npy: damaged" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("-m", "common.store", copied.parent, ok=False)
    assert "no slice store" in done.stderr


def test_folders_that_reduce_cannot_use(made, stopped, tmp_path):
    data, out = made[0] / "ct", made[0] / "store"
    (tmp_path / "file").touch()
    shutil.copytree(data, tmp_path / "other" / "ct")
    (tmp_path / "other" / "ct" / "more").touch()

    def line(data, out):
        return stopped("reduce.py", data, out, *HASH)

    assert "no such folder" in line(tmp_path / "none", tmp_path / "o")
    assert "Not a directory" in line(data, tmp_path / "file" / "o")
    assert "File exists" in line(data, tmp_path / "file")
    assert "lies inside" in line(data, data / "o")
    assert "lies inside" in line(tmp_path / "other" / "ct", tmp_path / "other")
    assert "was made from other input" in line(tmp_path / "other" / "ct", out)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    expected = "no CT slice found; 1 file skipped, most: not a DICOM file"
    assert expected in line(tmp_path / "text", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_second_run_in_the_same_folder_stops(made, stopped):
    with exclusive(made[0] / "store"):
        assert "another run" in stopped("reduce.py", made[0] / "ct", made[0] / "store", *HASH)
    assert not (made[0] / "store" / ".lock").exists()


def edit_line(text, row, *cells):
    lines = text.splitlines()
    lines[row] = ",".join(cells)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda text: text.replace("kept", "keep", 1), "needs the columns row, kept and"),
        (lambda text: edit_line(text, 3, "2", "yes", "0", "1"), "in whole numbers"),
        (lambda text: edit_line(text, 3, "2", "2", "0", "1"), "kept must be 1 where a row"),
        (lambda text: edit_line(text, 3, "7", "1", "0", "1"), "must list the rows 0 to"),
        (lambda text: text + "99999,1,0,0\n", "must list the rows 0 to"),
        (lambda text: text + "9" * 30 + ",1,0,0\n", "in whole numbers"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "must list the rows 0 to"),
        (lambda text: text.replace(",1,", ",0,"), "kept must be 1 where a row"),
        (lambda text: "", "must list the rows 0 to"),
        (lambda text: edit_line(text, 3, "2", "0", "99999", "0"), "must be a kept row"),
        (lambda text: edit_line(text, 3, "2", "1", "99999", "0"), "kept must be 1 where a row"),
    ],
)
def test_a_selection_that_was_edited_wrongly_is_refused(copied, stopped, tmp_path, harm, message):
    path = copied / "hash-6.csv"
    path.write_text(harm(path.read_text()))
    assert message in stopped("pretrain.py", path, tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


def test_a_selection_is_known_by_its_own_store(made, copied, stopped, run, tmp_path):
    """Of as many slices: the checksum of slices.csv tells stores apart."""
    shutil.copytree(made[0] / "ct", tmp_path / "ct")
    first = sorted((tmp_path / "ct").rglob("*.dcm"))[0]
    data = bytearray(first.read_bytes())
    data[-20000:] = np.random.default_rng(0).integers(0, 8, 20000, np.uint8).tobytes()
    first.write_bytes(data)
    run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "every-n", "--size", 32)
    for ending in ("csv", "json"):
        shutil.copy(copied / f"hash-6.{ending}", tmp_path / "out")
    line = stopped("pretrain.py", tmp_path / "out" / "hash-6.csv", tmp_path / "run", *TINY)
    assert "was made for another store" in line
    shutil.copy(copied / "hash-6.csv", tmp_path)
    assert "no store beside it" in stopped("pretrain.py", tmp_path / "hash-6.csv", tmp_path / "run")


def test_a_selection_of_other_pixels_or_of_other_code_is_another(made, run, edited, tmp_path):
    """The same slices at another size are another run's data; an edited rule needs a new selection."""
    folder = made[0]
    run("reduce.py", folder / "ct", tmp_path / "small", *HASH[:2], "--size", 16)
    small = store.read_selection(tmp_path / "small" / "hash-6.csv")
    selection = store.read_selection(folder / "store" / "hash-6.csv")
    assert small.kept.tolist() == selection.kept.tolist() and small.digest != selection.digest
    edited("common/reduction.py", "remaining[0]", "remaining[-1]")
    with pytest.raises(SystemExit, match="another version of common/reduction.py: make it again"):
        store.read_selection(folder / "store" / "hash-6.csv")


def test_read_selection(made):
    """The rows as the file has them; the digest changes with the selection."""
    path = made[0] / "store" / "hash-6.csv"
    selection = store.read_selection(path)
    rows = table(path)
    assert selection.kept.tolist() == [int(row["row"]) for row in rows if row["kept"] == "1"]
    assert selection.representative.tolist() == [int(row["representative"]) for row in rows]
    slices = table(path.parent / "slices.csv")
    names = [selection.store.names[i] for i in selection.store.volume_index]
    assert names == [row["volume"] for row in slices]
    assert [f"{bits:016x}" for bits in selection.store.hashes] == [row["dhash"] for row in slices]
    assert selection.digest == store.read_selection(path).digest


def test_a_killed_reduce_leaves_no_workers(made, tmp_path):
    """They would wait for work for ever; and what is unfinished goes at the next start."""
    command = ["reduce.py", made[0] / "ct", tmp_path / "out", *HASH]
    slow = (
        "import time, reduce; from common import store; decode = store.decode\n"
        "def slowly(*arguments, **settings):\n"
        "    time.sleep(0.3); return decode(*arguments, **settings)\n"
        "store.decode = slowly; reduce.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, command[1:])], cwd=ROOT, stdout=subprocess.PIPE
    )
    while not list((tmp_path / "out").glob("*.unfinished")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # ends when the last process that holds its output has gone
