"""A made-up CT cohort and two labelled tasks: all scripts run on them with nothing downloaded.

    python -m common.toy FOLDER     # FOLDER/ct/patient-XX/*.dcm, toy-lesion.npz, toy-organ.npz

A patient is a phantom of ellipsoids, shifted and stretched at random, and noise. Lengths are mm: x
to the patient's left, y to the back, z down from the lung apex. All numbers are our choice, by eye.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, generate_uid

from common.files import Flags, digest, read_json, refuse_other, run_script

PADDING = -2000  # stored value outside the field of view

# Ellipsoids, painted in this order: centre x, y, z; half axes; HU. Long ones are tubes.
ORGANS = {
    "fat": (0, 0, 210, 175, 128, 2000, -95),
    "muscle": (0, 0, 210, 155, 112, 2000, 50),
    "inside": (0, -3, 210, 131, 90, 2000, -95),
    "left lung": (66, -6, 135, 56, 76, 150, -850),
    "right lung": (-66, -6, 135, 56, 76, 150, -850),
    "heart": (16, -36, 197, 56, 44, 58, 70),
    "aorta": (25, 32, 248, 12, 12, 190, 130),
    "liver": (-60, -18, 320, 66, 66, 95, 85),
    "spleen": (88, 26, 305, 32, 42, 55, 85),
    "left kidney": (58, 42, 372, 26, 30, 56, 110),
    "right kidney": (-58, 42, 384, 26, 30, 56, 110),
    "spine": (0, 62, 210, 22, 22, 2000, 300),
}
CLASSES = ("heart", "left lung", "right lung", "liver", "spleen", "left kidney")  # of toy-organ
PATIENTS = {"train": range(20), "val": range(20, 28), "test": range(28, 44)}  # of a task


def main():
    parser = Flags(prog="python -m common.toy", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    folder = parser.parse_args().folder
    if folder.exists():
        made = read_json(folder / "toy.json")
        return refuse_other(folder, made, {}, "remove it, or name another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    write_cohort(partial / "ct")
    write_tasks(partial)
    made = {"settings": {}, "code": {"common/toy.py": digest("common/toy.py")}}
    (partial / "toy.json").write_text(json.dumps(made))
    partial.rename(folder)


def write_cohort(folder, patients=8, slices=60, size=128, seed=0):
    """Write folder/patient-XX/*.dcm: a series of `slices` slices of size x size pixels each.

    Even patients: signed, padded outside a circle. Odd patients: unsigned 12 bit. File names do not
    follow z. Same arguments, same bytes.
    """
    x = np.linspace(-180, 180, size)
    outside = np.hypot(x, x[:, None]) > 180
    for patient in range(patients):
        rng = np.random.default_rng([seed, 0, patient])
        phantom = make_phantom(rng)
        spacing = rng.uniform(2.5, 6)
        top = rng.uniform(-30, max(0, 420 - spacing * slices))
        patient_folder = Path(folder, f"patient-{patient:02d}")
        patient_folder.mkdir(parents=True)
        for i, name in enumerate(rng.permutation(slices)):
            z = round(top + spacing * i, 4)
            stored = np.rint(render(phantom, z, x, x, rng) + 1024).clip(0, 4095).astype(np.uint16)
            if patient % 2 == 0:
                stored = np.where(outside, PADDING, stored.astype(np.int16))
            path = patient_folder / f"slice-{name:04d}.dcm"
            write_slice(path, stored, f"toy {seed} {patient}", i, z)


def write_slice(path, stored, series, number, z):
    """A DICOM file of int16 or of uint16 below 4096; series and number decide its UIDs."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    dataset.PatientName = dataset.PatientID = series
    dataset.Modality = "CT"
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = [-180, -180, -z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.RescaleSlope = 1
    dataset.RescaleIntercept = -1024
    bits = 12 if stored.dtype == np.uint16 else 16
    dataset.set_pixel_data(stored, "MONOCHROME2", bits, generate_instance_uid=False)
    if bits == 16:
        dataset.PixelPaddingValue = PADDING
    dataset.save_as(path, enforce_file_format=True)


def write_tasks(folder, size=64, seed=0):
    """Write toy-lesion.npz and toy-organ.npz as MedMNIST does, split by patient.

    For SPLIT train, val and test: SPLIT_images uint8 [N, size, size], each over its own range,
    and SPLIT_labels uint8 [N, 1]. No patient of the tasks is in the cohort.
    """
    for task, make_image in (("toy-lesion", lesion_slice), ("toy-organ", organ_crop)):
        arrays = {}
        for split, patients in PATIENTS.items():
            images, labels = [], []
            for patient in patients:
                rng = np.random.default_rng([seed, 1, patient])  # 0 in the cohort
                phantom = make_phantom(rng)
                for _ in range(15):
                    image, label = make_image(phantom, np.linspace(-0.5, 0.5, size), rng)
                    images.append(np.rint(255 * (image - image.min()) / np.ptp(image)))
                    labels.append([label])
            arrays[f"{split}_images"] = np.array(images, np.uint8)
            arrays[f"{split}_labels"] = np.array(labels, np.uint8)
        np.savez_compressed(Path(folder, f"{task}.npz"), **arrays)


def lesion_slice(phantom, side, rng):
    """A slice in HU through the lungs, and 1 if its three dense patches are wide, else 0."""
    x = side * 300
    image = render(phantom, rng.uniform(60, 180), x, x, rng)
    label = rng.integers(2)
    radii = (8, 30) if label else (2, 15)
    in_lung = (image < -700) & (np.hypot(x / 125, x[:, None] / 90) < 1)  # not the air around
    for row, column in rng.choice(np.argwhere(in_lung), 3):
        distance = np.hypot(x - x[column], x[:, None] - x[row]) / rng.uniform(*radii)
        image += 750 * np.exp(-(distance**2)) * in_lung
    return image, label


def organ_crop(phantom, side, rng):
    """A crop in HU around a point of an organ, and the organ's index in CLASSES."""
    label = rng.integers(len(CLASSES))
    x, y, z, *half, _ = phantom[list(ORGANS).index(CLASSES[label])]
    x, y, z = (x, y, z) + rng.uniform(-0.5, 0.5, 3) * half
    side = side * rng.uniform(75, 140)
    return render(phantom, z, x + side, y + side, rng), label


def make_phantom(rng):
    """One patient's ellipsoids, [N, 7]: those of ORGANS, shifted and stretched."""
    organs = np.array(list(ORGANS.values()), float)
    organs[:, :3] += rng.normal(0, (2.5, 2.5, 5), (len(organs), 3))
    organs[:, 3:6] *= rng.uniform(0.9, 1.1, (len(organs), 3))
    return organs


def render(phantom, z, x, y, rng):
    """An axial slice, HU [len(y), len(x)], `z` mm below the lung apex; x, y in mm."""
    pixel = x[1] - x[0]
    image = np.full((len(y), len(x)), -1000, np.float32)
    x, y = np.meshgrid(x, y)
    x = x + 6 * np.sin(y / 23 + z / 25)  # waves bend every outline, from slice to slice
    y = y + 6 * np.sin(x / 25 + z / 25)
    for middle_x, middle_y, middle_z, a, b, c, hu in phantom:
        if abs(z - middle_z) < c:
            cut = np.sqrt(1 - abs((z - middle_z) / c) ** 3)
            distance = np.hypot((x - middle_x) / a, (y - middle_y) / b)
            inside = (cut - distance) * min(a, b) / pixel + 0.5  # edges cover pixels in part
            image += inside.clip(0, 1) * (hu - image)
    image += 15 * rng.standard_normal(image.shape, np.float32)
    return np.maximum(image, -1024)


if __name__ == "__main__":
    run_script(main)
