"""From files to volumes in z order, stored values, HU and 8-bit slices."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from common import ct, dicom, volumes

FLAT = np.zeros((4, 4), int)


def load(folder):
    return volumes.find_volumes(folder, [file for file, _, _ in volumes.list_files(folder)])


def test_slices_are_ordered_along_the_normal_of_a_tilted_series(tmp_path, write_dicom):
    axes = np.array([[1, 0, 0], [0, np.cos(0.3), np.sin(0.3)]])
    for i, distance in enumerate([12.5, -3.0, 4.0, 40.0]):
        # the corner also wanders within the slice plane: z alone would mislead
        corner = np.round(distance * np.cross(*axes) + (-1) ** i * 100 * axes[1], 6)
        place = {"ImagePositionPatient": [*corner], "ImageOrientationPatient": [*axes.ravel()]}
        write_dicom(tmp_path / f"{i}.dcm", FLAT, InstanceNumber=i, **place)
    [volume], skipped, [(uid, warning)] = load(tmp_path)
    assert volume.files == ["1.dcm", "2.dcm", "0.dcm", "3.dcm"] and not skipped
    assert uid == volume.name and "gaps along z: 1, the widest 27.5 mm" in warning
    assert [*map(float, volume.positions)] == pytest.approx([-3.0, 4.0, 12.5, 40.0], abs=1e-3)


def test_series_are_grouped_by_uid_over_folders(tmp_path, write_dicom):
    """Without positions the InstanceNumber orders, then the name."""
    places = {f"x/{i}": ("1.2", i, [0, 0, -i]) for i in range(3)} | {"y/4": ("1.2", 0, [0, 0, 9])}
    places |= {"x/a": ("1.3", 10, None), "y/b": ("1.3", 9, None), "x/c": ("1.3", 9, None)}
    for name, (uid, number, position) in places.items():
        tags = {"SeriesInstanceUID": uid, "ImagePositionPatient": position}
        write_dicom(tmp_path / name, FLAT, InstanceNumber=number, **tags)
    grouped, _, _ = load(tmp_path)
    expected = [("1.2", ["x/2", "x/1", "x/0", "y/4"]), ("1.3", ["x/c", "y/b", "x/a"])]
    assert [(volume.name, volume.files) for volume in grouped] == expected
    assert grouped[1].positions == ["", "", ""]


@pytest.mark.parametrize(
    "stored, intercept, tags, hu",
    [
        ([0, 1024, 2024, 4095], -1024, {}, [-1024, 0, 1000, 3071]),
        ([40000, 0, 0, 0], -1024, {}, [38976, -1024, -1024, -1024]),  # above the int16 range
        ([-2000, -1024, 0, 500], 0, {}, [-1000, -1024, 0, 500]),  # padding is air, not water
        ([-1500, 0, 40, 80], 0, {"PixelPaddingValue": -1500}, [-1000, 0, 40, 80]),
        ([-2000, 0, 1024, -2048], -1024, {}, [-1024, -1024, 0, -1024]),  # official: as a stored 0
        ([-900, 7, 40, 80], -1024, {"PixelPaddingValue": 64636}, [-1024, -1017, -984, -944]),
        ([0, 10, 20, 30], "-01.024000E+03", {"RescaleSlope": "2"}, [-1024, -1004, -984, -964]),
    ],
)
def test_hu(tmp_path, write_dicom, stored, intercept, tags, hu):
    write_dicom(tmp_path / "a.dcm", np.reshape(stored, (2, 2)), RescaleIntercept=intercept, **tags)
    header = dicom.read_header(tmp_path / "a.dcm")
    values = dicom.read_stored(tmp_path / "a.dcm", header)
    assert ct.stored_to_hu(values, header).ravel().tolist() == hu


@pytest.mark.parametrize("padding", [None, (-900, -800), (2001, 2001)])
@pytest.mark.parametrize("window", [None, (40, 400)])
@pytest.mark.parametrize("low, high", [(-16384, 16383), (0, 32767), (700, 1200)])
def test_the_table_of_grey_values_is_the_plain_formula(padding, window, low, high):
    """All stored values are even, so that padding of 2001 lies among them, but never occurs."""
    tags = dict.fromkeys(dicom.Header._fields) | {"slope": 1.5, "intercept": -1024.0}
    header = dicom.Header(**tags | {"padding": padding})
    stored = 2 * np.random.default_rng(0).integers(low, high + 1, (40, 30))
    expected = ct.scale_to_uint8(ct.stored_to_hu(stored, header), window)
    stored = stored.astype(np.int16 if low < 0 else np.uint16)
    assert (ct.stored_to_uint8(stored, header, window) == expected).all()


@pytest.mark.parametrize("bits", [12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_stored_values_are_those_of_pydicom(tmp_path, write_dicom, bits, signed, syntax):
    """Whatever the unused high bits hold; little-endian pixels are read without pydicom."""
    low, high = (-30000, 30000) if signed else (0, 60000)
    stored = np.random.default_rng(0).integers(low, high, (7, 5))
    path = tmp_path / "a.dcm"
    write_dicom(path, stored, BitsStored=bits, HighBit=bits - 1)
    dataset = pydicom.dcmread(path)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, dataset)
    header = dicom.read_header(path)
    assert (header.plain is None) == (syntax == ExplicitVRBigEndian)
    for way in (header, header._replace(plain=None)):
        assert (dicom.read_stored(path, way) == pydicom.dcmread(path).pixel_array).all()


def test_scaling_is_min_max_rounded_or_a_window():
    """Paper: min-max of each slice; a constant one is 0 (ours)."""
    values = np.array([-1024.0, 0.0, 1.0, 3071.0])
    min_max = [0, round(1024 / 4095 * 255), round(1025 / 4095 * 255), 255]
    assert ct.scale_to_uint8(values).tolist() == min_max
    assert ct.scale_to_uint8(values, (40, 400)).tolist() == [0, 102, round(161 / 400 * 255), 255]
    assert ct.scale_to_uint8(np.full(2, 7.0)).tolist() == [0, 0]


def test_image_folders_and_the_flat_layout_of_the_authors(tmp_path):
    expected = {
        "one": ["one/p_1.png", "one/p_2.png"],
        "p1": ["p1_0.png", "p1_2.png", "p1_10.png"],
        "p_2": ["p_2_1.png"],
        "scan": ["scan/slice9.png", "scan/slice10.png"],
        "two/a": ["two/a_1.png"],
        "two/b": ["two/b_1.png"],
    }
    for name in sum(expected.values(), []):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    grouped, skipped, _ = load(tmp_path)
    assert not skipped and {volume.name: volume.files for volume in grouped} == expected
    positions = [position for volume in grouped for position in volume.positions]
    assert positions == ["1", "2", "0", "2", "10", "1", "9", "10", "1", "1"]
