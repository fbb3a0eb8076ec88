"""The made-up CT: repeatable, redundant along z like real CT, and with tasks that can be learned."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from common import ct, hashing, store, toy
from common.volumes import find_volumes, list_files


def digests(folder):
    """{file below folder: its CRC-32}"""
    return {file: store.crc32(folder / file) for file, _, _ in list_files(folder)}


def test_a_cohort_is_decided_by_its_seed(tmp_path):
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        toy.write_cohort(tmp_path / name, patients=2, slices=3, size=32, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "again")
    others = digests(tmp_path / "b").values()
    assert not set(digests(tmp_path / "a").values()) & set(others)


def test_neighbouring_slices_are_redundant(tmp_path):
    toy.write_cohort(tmp_path, patients=4)
    volumes, skipped, warnings = find_volumes(
        tmp_path, [file for file, _, _ in list_files(tmp_path)]
    )
    assert len(volumes) == 4 and not skipped and not warnings
    kept = 0
    slices = 0
    for volume in volumes:
        bits = [hashing.dhash(ct.read_slice(tmp_path / file)) for file in volume.files]
        hashes = np.array([int(hash, 16) for hash in bits], np.uint64)
        slices += len(hashes)
        while len(hashes):
            kept += 1
            hashes = hashes[hashing.hamming(hashes, hashes[0]) > 6]
    assert 0.08 < kept / slices < 0.25  # hash-6 keeps 14 % of the real CT of the README


@pytest.mark.parametrize("task, auc", [("toy-lesion", 0.65), ("toy-organ", 0.75)])
def test_a_linear_model_of_the_pixels_does_better_than_chance(tmp_path, task, auc):
    toy.write_tasks(tmp_path, size=16)
    arrays = np.load(tmp_path / f"{task}.npz")
    train, test = (
        arrays[f"{split}_images"].reshape(len(arrays[f"{split}_images"]), -1) / 255
        for split in ("train", "test")
    )
    model = LogisticRegression(C=0.01, max_iter=1000).fit(train, arrays["train_labels"].ravel())
    scores = model.predict_proba(test)
    if task == "toy-lesion":
        scores = scores[:, 1]
    assert roc_auc_score(arrays["test_labels"].ravel(), scores, multi_class="ovr") > auc
