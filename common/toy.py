"""A made-up CT cohort and two labelled tasks: all scripts run on them with nothing downloaded.

    python -m common.toy FOLDER     # FOLDER/ct/patient-XX/*.dcm, toy-lesion.npz, toy-organ.npz

A patient is a phantom of ellipsoids, shifted and stretched at random, and noise. Lengths are mm: x
to the patient's left, y to the back, z down from the lung apex. All numbers are our choice, by eye:
slices that look like CT and change slowly along z.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from common.files import one_digest

AIR, FAT, MUSCLE, BONE = -1000, -95, 50, 500  # HU
PADDING = -2000  # stored value outside the field of view
LONG = 2000  # half axis along z of what goes on from slice to slice

# Ellipsoids, painted in this order: centre x, y, z; half axes; HU.
WALL = {
    "skin and fat": (0, 0, 210, 175, 128, LONG, FAT),
    "muscle": (0, 0, 210, 155, 112, LONG, MUSCLE),
    "ribs": (0, -3, 210, 138, 97, LONG, BONE),  # a shell that `render` cuts into ribs
    "inside": (0, -3, 210, 131, 90, LONG, FAT),
}
LUNGS = {
    "left lung": (66, -6, 135, 56, 76, 150, -850),
    "right lung": (-66, -6, 135, 56, 76, 150, -850),
}
ORGANS = {
    "heart": (16, -36, 197, 56, 44, 58, 70),
    "left ventricle": (32, -32, 206, 26, 20, 36, 130),
    "aorta": (25, 32, 248, 12, 12, 190, 130),
    "windpipe": (0, 0, 50, 9, 9, 75, -980),
    "liver": (-60, -18, 320, 66, 66, 95, 85),
    "spleen": (88, 26, 305, 32, 42, 55, 85),
    "stomach": (52, -38, 305, 46, 36, 62, 35),
    "gas in the stomach": (56, -58, 300, 26, 12, 44, -950),
    "left kidney": (58, 42, 372, 26, 30, 56, 110),
    "right kidney": (-58, 42, 384, 26, 30, 56, 110),
    "vertebra": (0, 56, 210, 20, 16, LONG, BONE),
    "its marrow": (0, 56, 210, 17, 13, LONG, 200),
    "its arch": (0, 80, 210, 26, 9, LONG, BONE),
    "gas in the colon": (-20, -66, 420, 50, 9, 40, -900),
    "spinal canal": (0, 77, 210, 9, 8, LONG, 25),
}
CLASSES = ("heart", "left lung", "right lung", "liver", "spleen", "left kidney")  # of toy-organ
VESSELS = 150  # in both lungs together
# patients of each task
SPLITS = {"train": range(20), "val": range(20, 28), "test": range(28, 44)}
IMAGES_A_PATIENT = 15


def main():
    parser = argparse.ArgumentParser(description="Write a made-up CT cohort and two tasks.")
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--patients", type=int, default=8, help="patients of the unlabelled cohort")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists: remove it or name another folder")
    # a killed run must not look finished
    partial = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_cohort(partial / "ct", args.patients, seed=args.seed)
    write_tasks(partial, seed=args.seed)
    (partial / "code.txt").write_text(one_digest("common/toy.py") + "\n")
    os.rename(partial, args.folder)


def write_cohort(folder, patients=8, slices=60, size=128, seed=0):
    """Write folder/patient-XX/*.dcm: a series of `slices` slices of size x size pixels each.

    Even patients: signed 16 bit, padded outside a circle. Odd patients: unsigned 12 bit. File
    names do not follow z. Same arguments, same bytes.
    """
    x = np.linspace(-180, 180, size)
    outside = np.hypot(x, x[:, None]) > 180
    for number in range(patients):
        rng = np.random.default_rng([seed, 0, number])
        patient = make_patient(rng)
        spacing = (5.0, 2.5, 6.0, 4.0)[number % 4]
        top = rng.uniform(-30, max(0, 420 - spacing * slices))
        names = rng.permutation(slices)
        patient_folder = Path(folder, f"patient-{number:02d}")
        patient_folder.mkdir(parents=True)
        for i, z in enumerate(top + spacing * np.arange(slices)):
            hu = add_noise(render(patient, z, x, x), rng)
            stored = np.rint(hu + 1024).clip(0, 4095).astype(np.uint16)
            if number % 2 == 0:
                stored = np.where(outside, PADDING, stored.astype(np.int16))
            path = patient_folder / f"slice-{names[i]:04d}.dcm"
            write_slice(path, stored, f"toy {seed} {number}", i + 1, [-180, -180, round(-z, 4)])


def write_slice(path, stored, series, number, position):
    """A DICOM file of int16 or of uint16 below 4096; series and number decide its UIDs."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    dataset.PatientName = dataset.PatientID = series
    dataset.Modality = "CT"
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = position
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
    side = np.linspace(-0.5, 0.5, size)
    for task, make_image in (("toy-lesion", lesion_slice), ("toy-organ", organ_crop)):
        arrays = {}
        for split, patients in SPLITS.items():
            images = []
            labels = []
            for number in patients:
                rng = np.random.default_rng([seed, 1, number])  # the cohort's are seed, 0, number
                patient = make_patient(rng)
                for _ in range(IMAGES_A_PATIENT):
                    image, label = make_image(patient, side, rng)
                    image = add_noise(image, rng)
                    images.append(np.rint(255 * (image - image.min()) / np.ptp(image)))
                    labels.append([label])
            arrays[f"{split}_images"] = np.array(images, np.uint8)
            arrays[f"{split}_labels"] = np.array(labels, np.uint8)
        np.savez_compressed(Path(folder, f"{task}.npz"), **arrays)


def lesion_slice(patient, side, rng):
    """A slice in HU through the lungs, and 1 if it holds 2 to 4 dense patches there, else 0."""
    x = side * 300
    image = render(patient, rng.uniform(60, 180), x, x)
    label = rng.integers(2)
    in_lung = (image < -700) & (np.hypot(x / 125, x[:, None] / 90) < 1)  # not the air around
    for row, column in rng.choice(np.argwhere(in_lung), label * rng.integers(2, 5)):
        distance = np.hypot(x - x[column], x[:, None] - x[row]) / rng.uniform(8, 30)
        image += 750 * np.exp(-(distance**2)) * in_lung
    return image, label


def organ_crop(patient, side, rng):
    """A crop in HU around a point of an organ, and the organ's index in CLASSES."""
    label = rng.integers(len(CLASSES))
    middle, half = np.reshape((LUNGS | ORGANS)[CLASSES[label]][:6], (2, 3))
    x, y, z = middle + rng.uniform(-0.5, 0.5, 3) * half
    x, y = (x, y) * patient["scale"]
    side = side * rng.uniform(75, 140)
    return render(patient, z, x + side, y + side), label


def make_patient(rng):
    """One patient's ellipsoids, each [N, 7], and the phases of the waves that bend them."""
    x, y, z = rng.uniform((-110, -70, -20), (110, 60, 260), (VESSELS, 3)).T
    thin = rng.uniform(1, 7, VESSELS)
    vessels = zip(x, y, z, thin, thin, rng.uniform(10, 40, VESSELS), [MUSCLE] * VESSELS)
    return {
        "scale": rng.uniform(0.85, 1.1, 2),  # of x and y
        "wall": np.array(list(WALL.values()), float),
        "lungs": vary(LUNGS, rng),
        "vessels": list(vessels),
        "organs": vary(ORGANS, rng),
        "waves": rng.uniform(0, 2 * np.pi, 2),
    }


def vary(ellipsoids, rng):
    """[N, 7]: the ellipsoids with their centres shifted by some mm and their axes stretched."""
    ellipsoids = np.array(list(ellipsoids.values()), float)
    ellipsoids[:, :3] += rng.normal(0, (2.5, 2.5, 5), (len(ellipsoids), 3))
    ellipsoids[:, 3:6] *= rng.uniform(0.9, 1.1, (len(ellipsoids), 1))
    return ellipsoids


def render(patient, z, x, y):
    """A noise-free axial slice, HU [len(y), len(x)], `z` mm below the lung apex; x, y in mm."""
    x, y = np.meshgrid(x / patient["scale"][0], y / patient["scale"][1])
    # slow waves bend every outline, or organs would look like the ellipses they are
    x = x + 6 * np.sin(y / 23 + z / 25 + patient["waves"][0])
    y = y + 6 * np.sin(x / 25 + z / 25 + patient["waves"][1])
    pixel = abs(x[0, 1] - x[0, 0])
    image = np.full(x.shape, AIR, np.float32)

    def paint(ellipsoids, where=1.0):
        for middle_x, middle_y, middle_z, a, b, c, hu in ellipsoids:
            if abs(z - middle_z) < c:
                cut = np.sqrt(1 - abs((z - middle_z) / c) ** 3)  # blunt ends: long ones are tubes
                distance = np.hypot((x - middle_x) / a, (y - middle_y) / b)
                inside = (cut - distance) * min(a, b) / pixel + 0.5  # edges cover pixels in part
                image[:] += inside.clip(0, 1) * where * (hu - image)

    skin, muscle, ribs, inside = patient["wall"]
    rib_here = (10 * np.cos(9 * np.arctan2(y, np.abs(x)) + z / 8)).clip(0, 1)
    paint([skin, muscle])
    paint([ribs], where=rib_here)
    paint([inside])
    paint(patient["lungs"])
    paint(patient["vessels"], where=image < -600)
    paint(patient["organs"])
    return image


def add_noise(image, rng):
    """The slice [H, W] with grainy noise, in HU."""
    noise = rng.standard_normal(image.shape, np.float32)
    noise += (np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.maximum(image + 15 * noise, -1024)


if __name__ == "__main__":
    main()
