"""The made-up CT: repeatable, redundant along z like real CT, with tasks that can be learned."""

from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from common import ct, dicom, hashing, toy
from common.reduction import Group, by_hash
from common.volumes import find_volumes, list_files


def test_the_seed_decides_and_a_folder_that_exists_is_left_as_it_is(
    here, stopped, monkeypatch, tmp_path
):
    contents = []
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        toy.write_cohort(tmp_path / name, 2, 2, 16, seed)
        contents.append([file.read_bytes() for file in sorted(tmp_path.glob(f"{name}/*/*"))])
    assert len(contents[0]) == 4 and contents[0] == contents[1]
    assert not set(contents[0]) & set(contents[2])
    monkeypatch.setattr(toy, "write_cohort", partial(toy.write_cohort, slices=2, size=16))
    monkeypatch.setattr(toy, "write_tasks", lambda folder: None)
    here("common.toy", tmp_path / "toy")
    monkeypatch.setattr(toy, "write_cohort", None)
    here("common.toy", tmp_path / "toy")
    made = (tmp_path / "toy" / "toy.json").read_text()
    (tmp_path / "toy" / "toy.json").write_text(made.replace('toy.py": "', 'toy.py": "1'))
    assert "common/toy.py 1" in stopped("common.toy", tmp_path / "toy")


def test_neighbouring_slices_are_redundant(tmp_path):
    toy.write_cohort(tmp_path, patients=2)
    volumes, skipped, warnings = find_volumes(tmp_path, [file[0] for file in list_files(tmp_path)])
    assert not skipped and not warnings
    paddings = [volume.headers[0].padding for volume in volumes]
    assert sorted(paddings) == [(toy.PADDING, toy.PADDING), (dicom.PAINTED, dicom.PAINTED)]
    kept = 0
    for volume in volumes:
        slices = [ct.read_slice(tmp_path / file) for file in volume.files]
        hashes = np.array([int(hashing.slice_hash(slice8), 16) for slice8 in slices], np.uint64)
        representative, _ = by_hash(Group(hashes, None, None, None), 6)
        kept += len(np.unique(representative))
    assert 0.08 < kept / 120 < 0.25  # hash-6 keeps 14 % of the real CT of the README


@pytest.mark.parametrize("task, auc", [("toy-lesion", 0.65), ("toy-organ", 0.75)])
def test_a_linear_model_of_the_pixels_does_better_than_chance(tmp_path, task, auc):
    toy.write_tasks(tmp_path, size=16)
    arrays = np.load(tmp_path / f"{task}.npz")
    train, test = (arrays[f"{split}_images"].reshape(-1, 256) / 255 for split in ("train", "test"))
    model = LogisticRegression(C=0.01, max_iter=1000).fit(train, arrays["train_labels"].ravel())
    scores = model.predict_proba(test)
    if task == "toy-lesion":
        scores = scores[:, 1]
    assert roc_auc_score(arrays["test_labels"].ravel(), scores, multi_class="ovr") > auc
