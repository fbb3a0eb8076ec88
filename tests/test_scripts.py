"""The real scripts, tiny, in subprocesses, on toy CT."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image

from common import ct, reduction, similarity, toy
from common.encoder import load_encoder
from common.files import exclusive

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "resnet18", "--size", 16, "--batch-size", 16, "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """A toy cohort of 3 patients with one file cut short, and its hash-6 selection."""
    folder = tmp_path_factory.mktemp("made")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    done = run("reduce.py", folder / "ct", folder / "store", "--strategy", "hash", "--size", 32)
    return folder, cut, done.stdout


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_reduce_writes_the_contract(made):
    folder, cut, stdout = made
    store = folder / "store"
    slices, rows, selection = (
        np.load(store / "slices.npy"),
        table(store / "slices.csv"),
        table(store / "hash-6.csv"),
    )
    files = list((folder / "ct").rglob("*.dcm"))
    assert slices.shape == (len(files) - 1, 32, 32) and slices.dtype == np.uint8
    assert list(rows[0]) == ["row", "volume", "position", "file", "dhash"] and len(rows) == len(
        slices
    )
    assert list(selection[0]) == ["row", "kept", "representative", "similarity"] and len(
        selection
    ) == len(slices)
    [skipped] = table(store / "skipped.csv")
    assert (
        skipped["file"] == cut.relative_to(folder / "ct").as_posix()
        and "pixel data" in skipped["reason"]
    )
    assert "1 file skipped" in stdout
    hashes = [imagehash.hex_to_hash(row["dhash"]) for row in rows]
    for row, line in zip(rows, selection):
        representative = int(line["representative"])
        assert (
            row["volume"] == rows[representative]["volume"]
            and selection[representative]["kept"] == "1"
        )
        assert int(line["similarity"]) == hashes[int(row["row"])] - hashes[representative] <= 6
        assert (line["kept"] == "1") == (representative == int(line["row"]))
        assert row["dhash"] == str(
            imagehash.dhash(Image.fromarray(ct.read_slice(folder / "ct" / row["file"])))
        )
    for volume in {row["volume"] for row in rows}:
        assert np.all(
            np.diff([float(row["position"]) for row in rows if row["volume"] == volume]) > 0
        )
    summary = json.loads((store / "hash-6.json").read_text())
    assert summary["slices"] == len(slices) and summary["kept"] == sum(
        line["kept"] == "1" for line in selection
    )
    assert "TOY" not in "".join(
        file.read_text() for file in store.glob("*.[cj]s*")
    )  # no patient's name
    assert Image.open(store / "hash-6.png").width > 1000


def test_the_store_is_reused_and_a_changed_ct_folder_is_noticed(made, run):
    folder, _, _ = made
    before = (folder / "store" / "slices.npy").stat().st_mtime_ns
    done = run(
        "reduce.py",
        folder / "ct",
        folder / "store",
        "--strategy",
        "random",
        "--keep",
        0.3,
        "--size",
        32,
    )
    assert (
        "headers" not in done.stderr
        and (folder / "store" / "slices.npy").stat().st_mtime_ns == before
    )
    kept = json.loads((folder / "store" / "random-keep-0.3.json").read_text())
    assert abs(kept["kept"] - 0.3 * kept["slices"]) <= 0.5
    for changed in (["--size", 48], ["--size", 32, "--window", 40, 400]):
        done = run(
            "reduce.py", folder / "ct", folder / "store", "--strategy", "all", *changed, ok=False
        )
        assert "was made from other input" in done.stderr and "Traceback" not in done.stderr
    extra = folder / "ct" / "extra.txt"
    extra.write_text("new")
    done = run(
        "reduce.py", folder / "ct", folder / "store", "--strategy", "all", "--size", 32, ok=False
    )
    extra.unlink()
    assert "files of DATA" in done.stderr


def test_the_number_of_workers_changes_no_byte(made, run):
    folder, _, _ = made
    run(
        "reduce.py",
        folder / "ct",
        folder / "store1",
        "--strategy",
        "hash",
        "--size",
        32,
        "--workers",
        1,
    )
    for name in ("slices.npy", "slices.csv", "skipped.csv", "hash-6.csv", "hash-6.png"):
        assert (folder / "store1" / name).read_bytes() == (folder / "store" / name).read_bytes()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder.pt with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(load_encoder("scratch", "resnet18", 0).state_dict(), path)
    return path


@pytest.mark.parametrize("strategy, threshold", [("ssim", 0.9), ("mi", 0.6), ("embedding", 0.999)])
def test_similarity_strategies_keep_the_rule(made, run, encoder, strategy, threshold):
    folder, store = made[0], made[0] / "store"
    flags = ["--strategy", strategy, "--size", 32] + ["--encoder", encoder] * (
        strategy == "embedding"
    )
    run("reduce.py", folder / "ct", store, *flags, "--threshold", threshold)
    slices, volumes = (
        np.load(store / "slices.npy"),
        [row["volume"] for row in table(store / "slices.csv")],
    )
    selection = table(store / f"{strategy}-{threshold}.csv")
    if strategy == "embedding":
        with torch.inference_mode():
            network = load_encoder(encoder, "resnet18", 0).eval()
            features = network(
                torch.from_numpy(slices)
                .float()
                .div(255)
                .sub(0.5)
                .div(0.5)[:, None]
                .expand(-1, 3, -1, -1)
            ).numpy()
    for volume in set(volumes):
        rows = [i for i, v in enumerate(volumes) if v == volume]
        if strategy == "embedding":
            measure = similarity.cosine(features[rows])
        else:
            measure = similarity.MEASURES[strategy](slices[rows])
        kept = [i for i, row in enumerate(rows) if selection[row]["kept"] == "1"]
        for i, row in enumerate(rows):
            found = measure(i, kept)
            first = next((k for k, value in zip(kept, found) if value >= threshold and k < i), i)
            assert int(selection[row]["representative"]) == rows[first]
            assert float(selection[row]["similarity"]) == pytest.approx(
                measure(i, [first])[0], abs=1e-5
            )
    assert 0 < sum(row["kept"] == "1" for row in selection) < len(slices)
    run("reduce.py", folder / "ct", store, *flags, "--keep", 0.25)
    summary = json.loads((store / f"{strategy}-keep-0.25.json").read_text())
    assert (
        abs(summary["kept"] - 0.25 * summary["slices"]) <= 1
        and summary["settings"]["threshold"] < 1
    )


def test_hash_to_a_budget_and_over_the_data_set(made, run):
    folder, store = made[0], made[0] / "store"
    hashes = np.array([int(row["dhash"], 16) for row in table(store / "slices.csv")], np.uint64)
    kept = {t: len(set(reduction.select_hash(hashes, t))) for t in range(65)}
    run(
        "reduce.py",
        folder / "ct",
        store,
        "--strategy",
        "hash",
        "--scope",
        "dataset",
        "--keep",
        0.3,
        "--size",
        32,
    )
    summary = json.loads((store / "hash-keep-0.3-dataset.json").read_text())
    closest = min(kept.values(), key=lambda count: abs(count - 0.3 * len(hashes)))
    assert summary["kept"] == kept[summary["settings"]["threshold"]] == closest


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--strategy", "ssim", "--scope", "dataset"], "--scope dataset is for"),
        (["--strategy", "embedding"], "--encoder belong together"),
        (["--strategy", "embedding", "--encoder", "nowhere.pt"], "no such file"),
        (["--strategy", "embedding", "--encoder", "imagenet"], "cannot be downloaded"),
        (["--strategy", "hash", "--threshold", 2.5], "whole number"),
        (["--strategy", "mi", "--threshold", 0.5, "--keep", 0.1], "exclude each other"),
        (["--strategy", "hash", "--keep", 1.5], "not a share"),
    ],
)
def test_wrong_flags_of_reduce_get_one_line(made, stopped, tmp_path, monkeypatch, flags, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers: as without internet
    assert words in stopped("reduce.py", made[0] / "ct", made[0] / "store", "--size", 32, *flags)


def test_pretrain_resumes_to_the_same_bytes(made, run, stopped, capsys, tmp_path):
    """A run stopped half-way (as its checkpoint is on disk) ends like one that was not."""
    folder, _, _ = made
    selection = folder / "store" / "hash-6.csv"
    run("pretrain.py", selection, tmp_path / "a", "--steps", 6, *TINY)
    program = (
        "import pretrain, time; pretrain.SAVE_EVERY = 0; real = pretrain.save\n"
        "def save(path, state):\n"
        "    real(path, state)\n"
        "    if state.get('step') == 3: raise SystemExit(9)\n"
        "pretrain.save = save; pretrain.main()"
    )
    run("-c", program, selection, tmp_path / "b", "--steps", 6, *TINY, ok=False)
    assert not (tmp_path / "b" / "encoder.pt").exists()
    assert (
        "going on at step 3"
        in run("pretrain.py", selection, tmp_path / "b", "--steps", 6, *TINY).stdout
    )
    assert (tmp_path / "a" / "encoder.pt").read_bytes() == (
        tmp_path / "b" / "encoder.pt"
    ).read_bytes()
    assert (
        stopped("pretrain.py", selection, tmp_path / "a", "--steps", 6, *TINY) == ""
        and "nothing to do" in capsys.readouterr().out
    )
    assert "other settings (steps 6 -> 7)" in stopped(
        "pretrain.py", selection, tmp_path / "a", "--steps", 7, *TINY
    )
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"settings", "versions"} <= set(lines[0]) and lines[-1]["step"] == 6
    assert set(load_encoder(tmp_path / "a" / "encoder.pt", "resnet18", 0).state_dict()) == set(
        torch.load(tmp_path / "a" / "encoder.pt", weights_only=True)
    )


@pytest.mark.parametrize(
    "command, words",
    [
        (["reduce.py", "{t}/none", "{t}/o", "--strategy", "all"], "no such folder"),
        (["reduce.py", "{t}", "{t}/o", "--strategy", "all"], "lies inside"),
        (["reduce.py", "{t}/empty", "{t}/o", "--strategy", "all"], "no CT slice"),
        (["pretrain.py", "{t}/none.csv", "{t}/r"], "no such selection"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, stopped, command, words):
    (tmp_path / "empty").mkdir()
    assert words in stopped(*(part.format(t=tmp_path) for part in command))


def test_an_error_is_one_line_and_no_traceback(tmp_path, run):
    done = run("reduce.py", tmp_path / "none", tmp_path / "o", "--strategy", "hash", ok=False)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_damaged_store_is_noticed(made, run, stopped, tmp_path):
    shutil.copytree(made[0] / "store", tmp_path / "store")
    whole = (tmp_path / "store" / "slices.npy").read_bytes()
    for harm in (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], whole[:-1], b""):
        (tmp_path / "store" / "slices.npy").write_bytes(harm)
        assert "damaged" in stopped(
            "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
        )
        assert "damaged" in stopped(
            "reduce.py", made[0] / "ct", tmp_path / "store", "--strategy", "hash", "--size", 32
        )
    for harm in ("", "{", "[]"):
        (tmp_path / "store" / "store.json").write_text(harm)
        assert "damaged" in stopped(
            "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
        )
        assert "damaged" in stopped(
            "reduce.py", made[0] / "ct", tmp_path / "store", "--strategy", "hash", "--size", 32
        )
    (tmp_path / "store" / "store.json").unlink()  # as in a store made by hand
    assert "not an array of slices" in stopped(
        "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
    )


def test_a_second_run_in_the_same_folder_stops(made, stopped):
    with exclusive(made[0] / "store"):
        assert "another run" in stopped(
            "reduce.py", made[0] / "ct", made[0] / "store", "--strategy", "hash", "--size", 32
        )
    assert not (made[0] / "store" / ".lock").exists()


def test_ctrl_c_ends_with_one_line(made, tmp_path):
    command = [
        sys.executable,
        "pretrain.py",
        made[0] / "store" / "hash-6.csv",
        tmp_path / "run",
        "--epochs",
        9999,
        *TINY,
    ]
    heeds = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs start with it ignored
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeds
    )
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1
        and stderr.splitlines()[-1].startswith("stopped:")
        and "Traceback" not in stderr
    )
    assert (
        not list((tmp_path / "run").glob("*.unfinished"))
        and not (tmp_path / "run" / ".lock").exists()
    )


def test_a_reproduction_of_the_row_that_needs_another(tmp_path, run):
    """Embedding selects with the encoder of ALL, so that is pre-trained first."""
    command = ["reproduce.sh", "--out", tmp_path / "out", "--rows", "Embedding"]
    command += ["--pretrain", "--arch resnet18 --size 16 --steps 3 --optimizer adamw"]
    command += ["--evaluate", "--protocol linear --arch resnet18 --size 32 --seeds 2"]
    done = run(*command, program="bash")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text in done.stdout and "| Embedding |" in text and "pretrain-ALL-0" in done.stdout
    assert len(table(tmp_path / "out" / "results.csv")) == 2 * 2
    again = run(*command, program="bash")
    assert "pretrain-" not in again.stdout and text in again.stdout
