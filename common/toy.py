"""A made-up CT cohort and two labelled tasks: the whole pipeline runs on them with nothing downloaded.

    python -m common.toy FOLDER        # FOLDER/ct/patient-XX/*.dcm, FOLDER/toy-lesion.npz, FOLDER/toy-organ.npz

Nobody was scanned: a patient is a table of ellipsoids, shifted and stretched at random and cut into axial slices. Lengths
are mm: x to the patient's left, y to the back from the vertebral body, depth down from the lung apex. All numbers are our
choice, by eye: slices that look like CT and change slowly along z, so that many are redundant.
"""

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AIR, FAT, MUSCLE = -1000, -95, 52  # HU
PADDING = -2000  # stored value outside the field of view
DIAPHRAGM = 250  # depth; organs centred below it end at its domes

# Centre x, y, depth; half axes; turn in degrees; HU; HU gained with contrast agent. "in ..." moves with the line before it.
ORGANS = {
    "heart": (15, -76, 197, 65, 48, 58, 32, -80, 0),
    "in heart, wall": (16, -76, 198, 59, 43, 55, 32, 48, 60),
    "in heart, right": (-4, -90, 196, 26, 19, 40, 25, 42, 160),
    "in heart, left": (34, -76, 206, 30, 15, 36, 38, 42, 160),
    "in heart, atrium": (6, -46, 176, 27, 13, 24, 5, 42, 160),
    "in heart, aorta": (-9, -76, 132, 16, 15, 55, 0, 42, 160),
    "in heart, trunk": (12, -72, 138, 15, 22, 22, -25, 42, 160),
    "in heart, artery": (-14, -55, 138, 32, 9, 12, 8, 42, 160),
    "upper vena cava": (-28, -64, 105, 10, 9, 80, 0, 42, 190),
    "oesophagus": (4, -27, 110, 7, 8, 170, 0, 38, 10),
    "left carotid": (21, -44, 20, 5, 5, 62, 0, 42, 160),
    "right carotid": (-21, -46, 20, 5, 5, 62, 0, 42, 160),
    "arch": (6, -50, 82, 12, 42, 15, -28, 42, 160),
    "in arch, descending": (25, -20, 248, 12, 12, 172, 0, 42, 160),
    "windpipe": (-1, -43, -10, 11, 11, 122, 0, 30, 0),
    "in windpipe": (-1, -43, -10, 9, 9, 120, 0, -980, 0),
    "in right bronchus": (-17, -43, 121, 9, 6, 15, 20, -960, 0),
    "in left bronchus": (18, -43, 124, 9, 6, 15, -20, -960, 0),
    "spleen": (92, -14, 305, 30, 50, 55, -22, 48, 70),
    "pancreas": (12, -56, 352, 58, 11, 20, -14, 40, 50),
    "stomach": (58, -78, 305, 46, 40, 62, -20, 42, 25),
    "in stomach": (58, -78, 305, 40, 34, 55, -20, 12, 0),
    "in stomach, gas": (60, -98, 300, 26, 12, 44, 0, -950, 0),
    "gallbladder": (-52, -92, 372, 14, 19, 28, 20, 8, 0),
    "portal vein": (-52, -58, 320, 36, 6, 17, 18, 42, 130),
    "hepatic vein": (-78, -62, 286, 30, 5, 15, -28, 42, 130),
    "left kidney": (60, 4, 372, 27, 31, 56, 35, 34, 150),
    "in left kidney": (52, -3, 372, 11, 14, 34, 35, -55, 60),
    "right kidney": (-60, 4, 384, 27, 31, 56, -35, 34, 150),
    "in right kidney": (-52, -3, 384, 11, 14, 34, -35, -55, 60),
    "colon": (-6, -112, 400, 70, 15, 40, 4, 35, 20),
    "in colon, gas": (-12, -116, 400, 45, 7, 30, 4, -900, 0),
    "left colon": (104, -40, 400, 17, 21, 75, 0, 30, 20),
    "in left colon, gas": (104, -46, 400, 10, 10, 60, 0, -800, 0),
    "jejunum": (58, -70, 405, 34, 26, 40, 30, 38, 45),
    "vena cava": (-24, -40, 345, 12, 11, 135, 0, 42, 110),
}
SHAPED = {
    "left lung": (72, -45, 130, 40, 50, 70),
    "right lung": (-72, -45, 130, 40, 50, 70),
    "liver": (-72, -55, 320, 50, 50, 45),
}  # centre and half axes of what chest wall and diaphragm shape
CLASSES = (
    "heart",
    "left lung",
    "right lung",
    "liver",
    "spleen",
    "left kidney",
)  # toy-organ's label is the index here
SPLITS = {
    "train": range(20),
    "val": range(20, 28),
    "test": range(28, 44),
}  # patients of each task, 15 images a patient


def make_patient(rng):
    """One patient's organs, vessels, build, densities (HU) and noise (HU), drawn from `rng`: a dict."""
    organs, uniform = {}, rng.uniform
    for name, row in ORGANS.items():
        if not name.startswith("in "):
            shift, stretch = rng.normal(0, (4, 4, 7)), uniform(0.88, 1.12)
        organs[name] = [
            *(row[:3] + shift).tolist(),
            *(half * stretch for half in row[3:6]),
            *row[6:],
        ]
    return {
        "organs": organs,
        "vessels": grow_vessels(rng),
        "wide": uniform(0.88, 1.1),
        "deep": uniform(0.86, 1.1),
        "tall": uniform(0.9, 1.1),
        "fat": uniform(6, 30),
        "breast": max(0, uniform(-30, 30)),
        "contrast": uniform(0, 1),
        "dome": rng.normal((240, 7), (9, 3)).tolist(),
        "lung": uniform(-880, -820),
        "bone": uniform(0.8, 1.15),
        "spine": uniform(0, 27),
        "noise": uniform(10, 26),
        "waves": uniform(0, 2 * np.pi, 4).tolist(),
    }


def grow_vessels(rng):
    """Pulmonary vessels as beads on branches that fork away from each hilum: float32 [4, N], x, y, depth and radius."""
    tip = np.repeat([[38.0, -48, 138], [-38.0, -50, 138]], 9, axis=0)
    heading, beads = rng.normal(0, 1, tip.shape) + np.sign(tip) * [1, 0, 0.2], []
    for radius in (4.2, 3.4, 2.7, 2.1, 1.6, 1.2):
        heading *= [1, 1, 1.4] / np.linalg.norm(heading, axis=1, keepdims=True)
        path = (
            tip
            + heading
            * radius
            * rng.uniform(5, 11, (len(tip), 1))
            * np.linspace(0, 1, 14)[:, None, None]
        )
        beads.append(np.insert(path.reshape(-1, 3), 3, radius, axis=1))
        tip, heading = np.tile(path[-1], (2, 1)), np.tile(heading, (2, 1))
        heading += rng.normal(0, 0.5, heading.shape)
    return np.concatenate(beads).T.astype(np.float32)


def render(patient, depth, x, y):
    """A noise-free axial slice, float32 HU [len(y), len(x)], `depth` mm below the lung apex; x, y in mm, evenly rising."""
    p, depth = patient, float(depth / patient["tall"])
    x, y = np.float32(x / p["wide"]), np.float32(y / p["deep"])
    # Slow waves bend every outline, or organs would look like the ellipses they are.
    bend = [
        np.sin(line / wave + depth / 50 + phase) * size
        for line, wave, phase, size in zip(
            (y, y, x, x), (23, 9, 25, 10), p["waves"], (3.5, 1.2, 3.5, 1.2)
        )
    ]
    grid = {
        "x": x,
        "y": y,
        "X": x + (bend[0] + bend[1])[:, None],
        "Y": y[:, None] + bend[2] + bend[3],
    }
    levels = (-40, 0, 40, 100, 200, 300, 460)
    side = at(
        depth, levels, (48, 74, 104, 124, 133, 133, 124)
    )  # half width and front of the chest's inside
    front = at(depth, levels, (58, 66, 88, 116, 138, 146, 136))
    image = np.full((len(y), len(x)), AIR, np.float32)
    inside = draw_wall(image, grid, p, depth, side, front)
    draw_trunk(image, grid, p, depth, front, inside)
    for x, y, a, b, turn, shell, marrow in bones(
        depth, (depth + p["spine"]) % 27 / 27, side, front
    ):
        oval(image, grid, x, y, a, b, turn, shell * p["bone"])
        oval(image, grid, x, y, max(a - 2.6, 1), max(b - 2.6, 1), turn, marrow * p["bone"])
    return image


def at(depth, depths, values):
    """Linear interpolation to a plain float: NumPy's own would turn each float32 slice into float64, at twice the time."""
    return float(np.interp(depth, depths, values))


def paint(image, margin, hu, grid):
    """Set HU in place where `margin`, mm to an edge, is positive; part-way over one pixel at the edge (partial volume)."""
    image += (margin / (grid["x"][1] - grid["x"][0]) + 0.5).clip(0, 1) * (hu - image)


def oval(image, grid, x, y, a, b, turn, hu, within=None):
    """Paint an ellipse with centre x, y and half axes a, b in mm, turned by degrees, where `within` [H, W] is positive."""
    reach = max(a, b) + 8  # the waves move an edge by 5 mm, and an edge is a pixel wide
    rows, columns = (
        grid["y"].searchsorted((y - reach, y + reach)),
        grid["x"].searchsorted((x - reach, x + reach)),
    )
    box = slice(*rows), slice(*columns)
    if rows[0] < rows[1] and columns[0] < columns[1]:
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        right, back = grid["X"][box] - x, grid["Y"][box] - y
        u, v = right * (cos / a) + back * (sin / a), back * (cos / b) - right * (sin / b)
        margin = (1 - np.sqrt(u * u + v * v)) * min(a, b)
        paint(image[box], margin if within is None else np.minimum(margin, within[box]), hu, grid)


def torso(grid, side, front, back):
    """mm to the edge of a rounded box, half width `side`, from y = -front to y = back: [H, W]."""
    u, v = (grid["X"] / side) ** 2, ((grid["Y"] - (back - front) / 2) * (2 / (front + back))) ** 2
    return (1 - np.sqrt(np.sqrt(u * u + v * v + 1.3 * u * v))) * min(side, (front + back) / 2)


def draw_wall(image, grid, p, depth, side, front):
    """Couch, breasts, skin, fat and muscle; returns mm to the inside of the chest wall, [H, W]."""
    wall, fat = side + at(depth, (-40, 0, 60, 150), (62, 70, 42, 17)), p["fat"]
    for gap in (8, 32):
        sheet = 1.8 - np.abs(grid["y"][:, None] - (66 + 0.6 * fat + gap - grid["x"] ** 2 / 1500))
        paint(image, np.minimum(sheet, 165 - np.abs(grid["x"])), -150, grid)
    swell = math.sqrt(max(0.01, 1 - ((depth - 160) / 80) ** 2))
    skin, inside = (
        torso(grid, wall + fat, front + 11 + 0.7 * fat, 66 + 0.6 * fat),
        torso(grid, side, front, 36),
    )
    for x in (-66, 66) if p["breast"] else ():
        oval(
            image,
            grid,
            x,
            6 - front - 0.7 * fat,
            52 * swell,
            (12 + p["breast"] + 0.7 * fat) * swell,
            0,
            FAT,
        )
    for margin, hu in ((skin, 40), (skin - 3, FAT), (torso(grid, wall, front + 11, 64), MUSCLE)):
        paint(image, margin, hu, grid)
    for sign in (-1, 1):
        oval(image, grid, sign * 27, 43, 25, 18, sign * 10, FAT)
        oval(image, grid, sign * 27, 43, 23, 16, sign * 10, MUSCLE + 5)
        if depth < 130:  # armpit
            oval(image, grid, sign * (side + 24), -14, 9, 40, -14 * sign, FAT, skin - 3)
    paint(image, inside, at(depth, (0, 40), (MUSCLE - 10, FAT)), grid)
    return inside


def draw_trunk(image, grid, p, depth, front, inside):
    """Lungs above the two domes of the diaphragm, liver below the right one, mediastinum and organs over them."""
    X, Y = grid["X"], grid["Y"]
    off = np.abs(X) - 70  # from the top of each dome; the slope to the middle is gentle
    dome = (
        p["dome"][0]
        + p["dome"][1] * np.clip(X / 40, -1, 1)
        + 95 * (np.maximum(off, -0.45 * off) / 70) ** 2
    )
    above = 0.4 * (dome + 95 * ((Y + 70) / 100) ** 2 - depth)
    below = np.minimum(inside - 1, 1 - above)
    if depth > 0:
        apex = 55 * (1 - math.sqrt(1 - max(0, 1 - depth / 60) ** 2))
        paint(
            image,
            np.minimum(inside - 2 - apex, above),
            p["lung"] + 0.5 * (Y + 40) + vessel_hu(grid, p, depth),
            grid,
        )
    if depth < 265:
        width = at(depth, (-40, 30, 120, 200, 265), (40, 34, 34, 30, 8))
        oval(image, grid, 0, 3 - front / 2, width, 3 + front / 2, 0, -40)
    lobe = (
        at(depth, (225, 300, 440), (62, 40, -75)) - X - 0.55 * (Y + 50)
    )  # the left lobe lies in front
    paint(image, np.minimum(below, 0.85 * lobe), 58 + 50 * p["contrast"], grid)
    oval(image, grid, 0, 10, 27, 30, 0, MUSCLE)
    for x, y, z, a, b, c, turn, hu, gain in p["organs"].values():
        if abs(depth - z) < 0.99 * c:
            cut = math.sqrt(
                1 - abs((depth - z) / c) ** 3
            )  # not ** 2: blunt ends, so that a long ellipsoid is a tube
            oval(
                image,
                grid,
                x,
                y,
                a * cut,
                b * cut,
                turn,
                hu + gain * p["contrast"],
                below if z > DIAPHRAGM else inside,
            )


def vessel_hu(grid, p, depth):
    """HU that pulmonary vessels add to the lung, [H, W]: a sum of Gaussian beads, saturated where they overlap."""
    x, y, z, radius = p["vessels"][:, np.abs(p["vessels"][2] - depth) < 1.5 * p["vessels"][3]]
    sigma = np.maximum(
        0.65 * radius, 0.5 * (grid["x"][1] - grid["x"][0])
    )  # thinner than a pixel: wider, as much fainter
    weight = 1.5 * (0.65 * radius / sigma) ** 2 * np.exp(-(((z - depth) / radius) ** 2))
    along, across = (
        np.exp(((line[:, None] - c) / sigma) ** 2 / -2)
        for line, c in ((grid["y"], y), (grid["x"], x))
    )
    return 860 * (1 - np.exp(-(along * weight) @ across.T))


def bones(depth, level, side, front):
    """Ovals of a slice: x, y, half axes, turn, HU of shell and marrow. `level`: 0 to 1 along a vertebra, disc up to 0.2."""
    size, arch, half = at(depth, (-40, 460), (12, 21)), math.sin(math.pi * level), (front + 36) / 2
    yield 0, 2, size, 0.78 * size, 0, *((480, 210) if level > 0.2 else (140, 110))
    if level > 0.2:
        yield from ((0, 27, 16, 13, 0, 560, 420), (0, 46, 4, 13 * arch, 0, 420, 420))
        yield from ((24 * sign, 28, 17 * arch, 4.5, -20 * sign, 400, 400) for sign in (-1, 1))
    yield 0, 25, 9, 8, 0, 25, 25  # spinal canal
    if 35 < depth < 215:  # sternum
        yield 0, 2 - front, at(depth, (35, 75, 215), (26, 15, 11)), 7, 0, 420, 170
    for sign in (-1, 1):
        if -20 < depth < 135:  # shoulder blade
            yield (
                sign * (101 + 0.08 * depth),
                38 - 0.05 * depth,
                38 - 0.1 * depth,
                4.5,
                -38 * sign,
                620,
                230,
            )
        for rib in range(12):
            along = (depth - 24 * rib + 14) / (
                70 + 9 * min(rib, 7)
            )  # 0 at the spine, 1 in front: a rib slopes down
            if 0.02 < along < (1.02 if rib < 10 else 0.55):
                cos, sin = (
                    math.cos(math.radians(66 - 140 * along)),
                    math.sin(math.radians(66 - 140 * along)),
                )
                turn = sign * math.degrees(math.atan2(half * cos, -side * sin))
                yield (
                    sign * (side + 5) * cos,
                    36 - half + (half + 5) * sin,
                    15 - 6 * abs(along - 0.5),
                    5,
                    turn,
                    *((620, 250) if along < 0.85 else (130, 110)),
                )  # cartilage in front


def add_noise(image, sigma, rng):
    """The slice [H, W] with white and grainy (correlated) noise, HU of standard deviation `sigma`, not below -1024."""
    white, grain = rng.standard_normal((2, *image.shape), np.float32)
    grain = sum(np.roll(grain, step, axis) for axis in (0, 1) for step in (-1, 0, 1)) / 8**0.5
    return np.maximum(image + sigma / 2**0.5 * (white + grain), -1024)


def write_cohort(folder, patients=8, slices=60, size=128, seed=0):
    """Write folder/patient-XX/*.dcm: a series of about `slices` slices of size x size pixels each.

    Even patients: signed 16 bit, padded outside a circle, names from the feet up. Odd: unsigned 12 bit, shuffled names.
    Same arguments, same bytes.
    """
    for number in range(patients):
        rng = np.random.default_rng([seed, 0, number])
        patient, padded, spacing = (
            make_patient(rng),
            number % 2 == 0,
            (5.0, 2.5, 4.0, 1.25)[number % 4],
        )
        pixel = (2 * (160 + patient["fat"]) * patient["wide"] + rng.uniform(-10, 30)) / size
        x = (np.arange(size) - (size - 1) / 2) * pixel
        y, outside = x - 36 * patient["deep"], padded & (np.hypot(x, x[:, None]) > x[-1])
        count = int(slices * rng.uniform(0.8, 1.2))
        top = rng.uniform(-30, max(0, 420 * patient["tall"] - spacing * count))
        names = np.arange(count)[::-1] if padded else rng.permutation(count)
        place = Path(folder, f"patient-{number:02d}")
        place.mkdir(parents=True)
        ds = new_series(f"toy {seed} {number}", padded)
        ds.PatientName, ds.PatientID, ds.Rows, ds.Columns = (
            f"TOY^{number:02d}",
            f"TOY-{number:02d}",
            size,
            size,
        )
        ds.SliceThickness, ds.PixelSpacing = spacing, [round(pixel, 6)] * 2
        for i, z in enumerate(top + spacing * np.arange(count)):
            hu = add_noise(render(patient, z, x, y), patient["noise"], rng)
            stored = np.where(outside, PADDING, np.rint(hu + 1024).clip(0, 4095))
            ds.SOPInstanceUID = generate_uid(entropy_srcs=[f"toy {seed} {number} {i}"])
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.InstanceNumber, ds.ImagePositionPatient = (
                i + 1,
                np.round((x[0], y[0], -z), 4).tolist(),
            )
            ds.PixelData = stored.astype("<i2").tobytes()
            ds.save_as(place / f"slice-{names[i]:04d}.dcm", enforce_file_format=True)


def new_series(source, signed):
    """A data set with what all slices of a series share: UIDs from the text `source`, signed 16 or unsigned 12 bit."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.Modality, ds.ImageOrientationPatient = (
        CTImageStorage,
        "CT",
        [1, 0, 0, 0, 1, 0],
    )
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(ds, name, generate_uid(entropy_srcs=[source, name]))
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.RescaleSlope, ds.RescaleIntercept = (
        1,
        "MONOCHROME2",
        1,
        -1024,
    )
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
        (16, 16, 15, 1) if signed else (16, 12, 11, 0)
    )
    if signed:
        ds.PixelPaddingValue = PADDING
    return ds


def lesion_slice(patient, step, rng):
    """A slice in HU through the lungs, and 1 if it holds ground-glass patches or nodules, else 0; `step`: -0.5 to 0.5."""
    x, label = step * 290 * patient["wide"], rng.integers(2)
    y = x - 40 * patient["deep"]
    image = render(patient, rng.uniform(50, 200) * patient["tall"], x, y)
    chest = (
        np.hypot(x / (115 * patient["wide"]), (y[:, None] / patient["deep"] + 45) / 75) < 1
    )  # not the air around
    for row, column in rng.choice(
        np.argwhere(chest & (image < -700) & (np.abs(x) > 40)), label * rng.integers(2, 5)
    ):
        width, hu = ((24, 600), (9, 900))[rng.integers(2)]
        distance = np.hypot(x - x[column], y[:, None] - y[row]) / (width * rng.uniform(0.7, 1.3))
        image += (
            hu * np.exp(-(distance**2)) * ((-300 - image) / 400).clip(0, 1)
        )  # not in vessels or the chest wall
    return image, label


def organ_crop(patient, step, rng):
    """A crop in HU near the middle of one organ, at its own scale, and the organ's index in CLASSES; `step`: -0.5 to 0.5."""
    label = rng.integers(len(CLASSES))
    centre, half = np.reshape((SHAPED | patient["organs"])[CLASSES[label]][:6], (2, 3))
    x, y, z = (centre + rng.uniform(-0.75, 0.75, 3) * half) * (
        patient["wide"],
        patient["deep"],
        patient["tall"],
    )
    step = step * rng.uniform(75, 140)
    return render(patient, z, step + x, step + y), label


def write_tasks(folder, size=64, seed=0):
    """Write toy-lesion.npz and toy-organ.npz as MedMNIST does, split by patient; no patient is in the cohort.

    For SPLIT train, val and test: SPLIT_images uint8 [N, size, size], each over its own range, SPLIT_labels uint8 [N, 1].
    """
    for task, make_image in (("toy-lesion", lesion_slice), ("toy-organ", organ_crop)):
        arrays = {}
        for split, numbers in SPLITS.items():
            images, labels = [], []
            for number in numbers:
                rng = np.random.default_rng([seed, 1, number])  # the cohort's are seed, 0, number
                patient = make_patient(rng)
                for _ in range(15):
                    image, label = make_image(patient, (np.arange(size) + 0.5) / size - 0.5, rng)
                    image = add_noise(image, patient["noise"], rng)
                    images.append(np.rint(255 * (image - image.min()) / np.ptp(image)))
                    labels.append([label])
            arrays |= {
                f"{split}_images": np.array(images, np.uint8),
                f"{split}_labels": np.array(labels, np.uint8),
            }
        np.savez_compressed(Path(folder, f"{task}.npz"), **arrays)


def main():
    parser = argparse.ArgumentParser(
        description="Write a made-up CT cohort and two labelled tasks."
    )
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--patients", type=int, default=8, help="patients of the unlabelled cohort")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists: remove it or name another folder")
    partial = args.folder.with_name(
        args.folder.name + ".partial"
    )  # a killed run must not look finished
    shutil.rmtree(partial, ignore_errors=True)
    write_cohort(partial / "ct", args.patients, seed=args.seed)
    write_tasks(partial, seed=args.seed)
    os.rename(partial, args.folder)


if __name__ == "__main__":
    main()
