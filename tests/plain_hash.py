"""What benchmark.py compares reduce.py with. It shares nothing with our code.

python tests/plain_hash.py DICOM FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pydicom
from PIL import Image


def plain_hash(data, folder):
    """As the authors' scripts do it: DICOM -> PNG -> dHash -> greedy -> copy. The files kept."""
    png, kept_folder = Path(folder, "png"), Path(folder, "kept")
    png.mkdir(parents=True)
    kept_folder.mkdir(parents=True)
    volumes = {}
    for file in sorted(Path(data).rglob("*.dcm")):
        dataset = pydicom.dcmread(file)
        stored = dataset.pixel_array.astype(np.int16)
        stored[stored == -2000] = 0
        hu = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        grey = cv2.normalize(hu, None, 0, 255, cv2.NORM_MINMAX)
        image = png / f"{file.parent.name}_{file.stem}.png"
        cv2.imwrite(str(image), np.rint(grey).astype(np.uint8))
        z = float(dataset.ImagePositionPatient[2])
        volumes.setdefault(dataset.SeriesInstanceUID, []).append((z, image, file))
    kept = []
    for slices in volumes.values():
        remaining = [(imagehash.dhash(Image.open(png)), png, dcm) for _, png, dcm in sorted(slices)]
        while remaining:
            first, image, file = remaining[0]
            shutil.copy(image, kept_folder)
            kept.append(file.relative_to(data).as_posix())
            remaining = [slice for slice in remaining if slice[0] - first > 6]
    return sorted(kept)


if __name__ == "__main__":
    print(json.dumps(plain_hash(*sys.argv[1:])))
