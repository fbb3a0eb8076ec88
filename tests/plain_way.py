"""The plain way to do what reduce.py does, as the authors' scripts do it, to measure beside; runs in .venv-benchmark.

python tests/plain_way.py hash DATA FOLDER         DICOM -> PNG -> dHash -> greedy -> copy; prints the kept files
python tests/plain_way.py pairs slices.npy N       pairs/s of scikit-image's SSIM and scikit-learn's mutual information
python tests/plain_way.py select slices.npy STRATEGY THRESHOLD FIRST LAST       greedy on rows FIRST to LAST - 1
"""

import json
import shutil
import sys
import time
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pydicom
from PIL import Image
from skimage.metrics import structural_similarity
from sklearn.metrics import normalized_mutual_info_score


def by_hash(data, folder):
    folder = Path(folder)
    series = {}
    for file in sorted(Path(data).rglob("*.dcm")):
        dataset = pydicom.dcmread(file)
        stored = dataset.pixel_array.astype(np.int16)
        stored[stored == -2000] = 0
        hu = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        grey = cv2.normalize(hu, None, 0, 255, cv2.NORM_MINMAX)
        png = folder / "png" / f"{file.parent.name}_{file.stem}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(png), np.rint(grey).astype(np.uint8))
        series.setdefault(dataset.SeriesInstanceUID, []).append(
            (float(dataset.ImagePositionPatient[2]), png, file)
        )
    kept = []
    (folder / "kept").mkdir()
    for slices in series.values():
        remaining = [
            (imagehash.dhash(Image.open(png)), png, file) for _, png, file in sorted(slices)
        ]
        while remaining:
            first, png, file = remaining[0]
            shutil.copy(png, folder / "kept")
            kept.append(file.relative_to(data).as_posix())
            remaining = [slice for slice in remaining if slice[0] - first > 6]
    return sorted(kept)


def similarity(strategy, a, b):
    if strategy == "ssim":
        return structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
    return normalized_mutual_info_score(a.ravel() // 8, b.ravel() // 8)


def pairs(slices, n):
    """For each measure: seconds, and the similarity of rows i and i + 1 for n rows all over the store."""
    slices = np.load(slices, mmap_mode="r")
    rows = np.linspace(0, len(slices) - 2, int(n)).astype(int)
    found = {}
    for strategy in ("ssim", "mi"):
        started = time.perf_counter()
        values = [similarity(strategy, slices[i], slices[i + 1]) for i in rows]
        found[strategy] = {"seconds": time.perf_counter() - started, "values": values}
    return found


def select(slices, strategy, threshold, first, last):
    """Representative of each row."""
    slices = np.load(slices, mmap_mode="r")
    remaining, representative = list(range(int(first), int(last))), {}
    while remaining:
        kept = remaining[0]
        gone = [
            i
            for i in remaining
            if i == kept or similarity(strategy, slices[kept], slices[i]) >= float(threshold)
        ]
        representative |= dict.fromkeys(gone, kept)
        remaining = [i for i in remaining if i not in gone]
    return [representative[i] for i in sorted(representative)]


if __name__ == "__main__":
    print(
        json.dumps({"hash": by_hash, "pairs": pairs, "select": select}[sys.argv[1]](*sys.argv[2:]))
    )
