"""A made-up CT cohort and two labelled tasks: all scripts run on them with nothing downloaded.

    python -m common.toy FOLDER     # FOLDER/ct/patient-XX/*.dcm, toy-lesion.npz, toy-organ.npz

A patient is a phantom: ellipsoids, lung vessels and noise, all shifted and stretched at random.
Lengths are mm: x to the patient's left, y to the back from the spine, z down from the lung apex.
The numbers are our choice, by eye: slices that look like CT and change slowly along z.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AIR, FAT, MUSCLE, BONE = -1000, -95, 50, 500  # HU
PADDING = -2000  # stored value outside the field of view
HEIGHTS = (-40, 0, 40, 100, 200, 300, 460)
CHEST_WIDTH = (48, 74, 104, 124, 133, 133, 124)  # half width of the chest's inside at HEIGHTS
CHEST_FRONT = (58, 66, 88, 116, 138, 146, 136)  # from the spine to the breastbone

# Ellipsoids, painted in this order: centre x, y, z; half axes; HU.
LUNGS = {
    "left lung": (68, -46, 135, 58, 92, 150, -850),
    "right lung": (-68, -46, 135, 58, 92, 150, -850),
}
ORGANS = {
    "fat between the lungs": (0, -66, 110, 30, 60, 150, -60),
    "heart": (14, -76, 197, 58, 46, 58, 70),
    "left ventricle": (32, -72, 206, 26, 20, 36, 130),
    "aortic arch": (-9, -76, 132, 16, 15, 55, 130),
    "aorta": (25, -20, 248, 12, 12, 172, 130),
    "pulmonary artery": (0, -64, 136, 34, 11, 16, 130),
    "windpipe": (-1, -43, 50, 9, 9, 75, -980),
    "liver": (-60, -58, 320, 70, 78, 95, 85),
    "spleen": (88, -14, 305, 34, 48, 55, 85),
    "stomach": (56, -78, 305, 48, 38, 62, 35),
    "gas in the stomach": (60, -98, 300, 26, 12, 44, -950),
    "left kidney": (58, 0, 372, 26, 30, 56, 110),
    "right kidney": (-58, 0, 384, 26, 30, 56, 110),
    "colon": (-12, -114, 405, 60, 12, 40, 45),
    "gas in the colon": (-12, -117, 405, 45, 7, 30, -900),
}
BONES = {
    "vertebra": (0, 3, 210, 20, 16, 999, BONE),
    "its marrow": (0, 3, 210, 17, 13, 999, 200),
    "its arch": (0, 27, 210, 28, 9, 999, BONE),
    "its spine": (0, 44, 210, 4, 13, 999, BONE),
    "spinal canal": (0, 25, 210, 9, 8, 999, 25),
    "breastbone": (0, -118, 125, 15, 7, 90, 300),
}
CLASSES = ("heart", "left lung", "right lung", "liver", "spleen", "left kidney")  # of toy-organ
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
    os.rename(partial, args.folder)


def write_cohort(folder, patients=8, slices=60, size=128, seed=0):
    """Write folder/patient-XX/*.dcm: a series of about `slices` slices of size x size pixels each.

    Even patients: signed 16 bit, padded outside a circle. Odd patients: unsigned 12 bit. File
    names do not follow z. Same arguments, same bytes.
    """
    for number in range(patients):
        rng = np.random.default_rng([seed, 0, number])
        patient = make_patient(rng)
        spacing = (5.0, 2.5, 4.0, 1.25)[number % 4]
        wide, deep, tall = patient["scale"]
        pixel = 2 * (170 + patient["fat"]) * wide / size
        x = (np.arange(size) - (size - 1) / 2) * pixel
        y = x - 36 * deep
        count = int(slices * rng.uniform(0.8, 1.2))
        top = rng.uniform(-30, max(0, 420 * tall - spacing * count))
        names = rng.permutation(count)
        patient_folder = Path(folder, f"patient-{number:02d}")
        patient_folder.mkdir(parents=True)
        for i, z in enumerate(top + spacing * np.arange(count)):
            hu = add_noise(render(patient, z, x, y), patient["noise"], rng)
            stored = np.rint(hu + 1024).clip(0, 4095).astype(np.uint16)
            if number % 2 == 0:
                stored = np.where(np.hypot(x, x[:, None]) > x[-1], PADDING, stored.astype(np.int16))
            position = np.round((x[0], y[0], -z), 4).tolist()
            path = patient_folder / f"slice-{names[i]:04d}.dcm"
            write_slice(path, stored, f"toy {seed} {number}", i + 1, position)


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
    step = (np.arange(size) + 0.5) / size - 0.5
    for task, make_image in (("toy-lesion", lesion_slice), ("toy-organ", organ_crop)):
        arrays = {}
        for split, patients in SPLITS.items():
            images = []
            labels = []
            for number in patients:
                rng = np.random.default_rng([seed, 1, number])  # the cohort's are seed, 0, number
                patient = make_patient(rng)
                for _ in range(IMAGES_A_PATIENT):
                    image, label = make_image(patient, step, rng)
                    image = add_noise(image, patient["noise"], rng)
                    images.append(np.rint(255 * (image - image.min()) / np.ptp(image)))
                    labels.append([label])
            arrays[f"{split}_images"] = np.array(images, np.uint8)
            arrays[f"{split}_labels"] = np.array(labels, np.uint8)
        np.savez_compressed(Path(folder, f"{task}.npz"), **arrays)


def lesion_slice(patient, step, rng):
    """A slice in HU through the lungs, and 1 if it holds 2 to 4 nodules or dense patches, else 0.

    step: from -0.5 to 0.5 along a side of the image.
    """
    wide, deep, tall = patient["scale"]
    x = step * 290 * wide
    y = x - 40 * deep
    image = render(patient, rng.uniform(50, 200) * tall, x, y)
    label = rng.integers(2)
    chest = np.hypot(x / (115 * wide), (y[:, None] / deep + 45) / 75) < 1  # not the air around
    lung = np.argwhere(chest & (image < -700) & (np.abs(x) > 40))
    for row, column in rng.choice(lung, label * rng.integers(2, 5)):
        distance = np.hypot(x - x[column], y[:, None] - y[row]) / rng.uniform(8, 30)
        only_in_lung = ((-300 - image) / 400).clip(0, 1)
        image += 750 * np.exp(-(distance**2)) * only_in_lung
    return image, label


def organ_crop(patient, step, rng):
    """A crop in HU near the middle of an organ, and the organ's index in CLASSES."""
    label = rng.integers(len(CLASSES))
    middle, half = np.reshape((LUNGS | ORGANS)[CLASSES[label]][:6], (2, 3))
    x, y, z = (middle + rng.uniform(-0.75, 0.75, 3) * half) * patient["scale"]
    step = step * rng.uniform(75, 140)
    return render(patient, z, step + x, step + y), label


def make_patient(rng):
    """One patient's build, ellipsoids, lung vessels and noise: a dict."""
    return {
        "scale": rng.uniform((0.88, 0.86, 0.9), 1.1),  # of x, y and z
        "fat": rng.uniform(6, 30),  # mm under the skin
        "waves": rng.uniform(0, 2 * np.pi, 2),
        "lungs": vary(LUNGS, rng),
        "organs": vary(ORGANS, rng),
        "vessels": grow_vessels(rng),
        "noise": rng.uniform(10, 26),  # HU
    }


def vary(ellipsoids, rng):
    """[N, 7]: the ellipsoids with their centres shifted by some mm and their axes stretched."""
    ellipsoids = np.array(list(ellipsoids.values()), float)
    ellipsoids[:, :3] += rng.normal(0, (2.5, 2.5, 5), (len(ellipsoids), 3))
    ellipsoids[:, 3:6] *= rng.uniform(0.9, 1.1, (len(ellipsoids), 1))
    return ellipsoids


def grow_vessels(rng, branches=120, beads=60):
    """Lung vessels as beads on branches from each hilum, ever thinner: [N, 4], x, y, z, radius."""
    side = np.where(np.arange(branches) % 2, 1, -1)
    hilum = np.outer(side, [38, 0, 0]) + [0, -49, 138]
    reach = np.outer(side, [35, 0, 0]) + rng.normal(0, (50, 45, 80), (branches, 3))
    along = np.linspace(0.1, 1, beads)[:, None, None]
    path = hilum + along * reach
    radius = np.broadcast_to(4 - 3 * along, (beads, branches, 1))
    return np.concatenate([path, radius], 2).reshape(-1, 4)


def render(patient, z, x, y):
    """A noise-free axial slice, HU [len(y), len(x)], `z` mm below the lung apex; x, y in mm."""
    wide, deep, tall = patient["scale"]
    x, y, z = x / wide, y[:, None] / deep, z / tall
    pixel = x[1] - x[0]
    # slow waves bend every outline, or organs would look like the ellipses they are
    grid = (
        x + 3.5 * np.sin(y / 23 + z / 50 + patient["waves"][0]),
        y + 3.5 * np.sin(x / 25 + z / 50 + patient["waves"][1]),
    )
    width = np.interp(z, HEIGHTS, CHEST_WIDTH)
    front = np.interp(z, HEIGHTS, CHEST_FRONT)
    wall = width + np.interp(z, (-40, 60, 150), (62, 42, 17))
    fat = patient["fat"]
    inside = rounded_box(grid, width, front, 36)

    image = np.full((len(y), len(x)), AIR, np.float32)
    paint(image, rounded_box(grid, wall + fat, front + 11 + fat, 66 + fat), FAT, pixel)
    paint(image, rounded_box(grid, wall, front + 11, 64), MUSCLE, pixel)
    paint(image, inside, FAT, pixel)
    # ribs: parts of the chest's wall that move along it from slice to slice
    around = np.arctan2(grid[1] + 50, np.abs(grid[0]))
    ribs = np.minimum(4 - np.abs(inside + 6), 30 * np.cos(9 * around + z / 8))
    paint(image, ribs, BONE, pixel)
    paint_ellipsoids(image, grid, patient["lungs"], z, inside - 3, pixel)
    in_lung = (image < -600) & (inside > 0)
    image += in_lung * vessel_hu(patient["vessels"], z, x, y)
    paint_ellipsoids(image, grid, patient["organs"], z, inside, pixel)
    paint_ellipsoids(image, grid, BONES.values(), z, np.inf, pixel)
    return image


def rounded_box(grid, width, front, back):
    """mm to the edge of a box, half width `width`, from y = -front to y = back: [H, W]."""
    u = (grid[0] / width) ** 2
    v = ((2 * grid[1] + front - back) / (front + back)) ** 2
    return (1 - (u**2 + v**2 + 1.3 * u * v) ** 0.25) * min(width, (front + back) / 2)


def paint_ellipsoids(image, grid, ellipsoids, z, within, pixel):
    """Paint the ellipsoids where `within`, mm to an edge, is positive."""
    for x, y, middle, a, b, c, hu in ellipsoids:
        if abs(z - middle) < 0.98 * c:
            cut = np.sqrt(1 - abs((z - middle) / c) ** 3)  # blunt ends: long ones are tubes
            distance = np.hypot((grid[0] - x) / a, (grid[1] - y) / b)
            margin = (cut - distance) * min(a, b)
            paint(image, np.minimum(margin, within), hu, pixel)


def paint(image, margin, hu, pixel):
    """Set HU in place where `margin`, mm to an edge, is positive; partly over a pixel at edges."""
    image += np.clip(margin / pixel + 0.5, 0, 1) * (hu - image)


def vessel_hu(vessels, z, x, y):
    """HU that vessels add to the lung, [H, W]: a sum of Gaussian beads, saturated."""
    bead_x, bead_y, bead_z, radius = vessels[np.abs(vessels[:, 2] - z) < 1.5 * vessels[:, 3]].T
    weight = np.exp(-(((bead_z - z) / radius) ** 2))
    along = weight * np.exp(-(((y - bead_y) / radius) ** 2))
    across = np.exp(-(((x[:, None] - bead_x) / radius) ** 2))
    return 860 * (1 - np.exp(-along @ across.T))


def add_noise(image, sigma, rng):
    """The slice [H, W] with grainy noise of standard deviation sigma, in HU."""
    noise = rng.standard_normal(image.shape, np.float32)
    noise += (np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.maximum(image + sigma * noise / 1.5**0.5, -1024)


if __name__ == "__main__":
    main()
