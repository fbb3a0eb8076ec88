"""From files to volumes in z order, stored values, HU and 8-bit slices."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from common import ct, dicom, volumes

FLAT = np.zeros((4, 4), int)


def load(folder, files=None):
    files = files or [file for file, _, _ in volumes.list_files(folder)]
    return volumes.find_volumes(folder, files)


def test_slices_are_ordered_along_the_normal_of_a_tilted_series(tmp_path, write_dicom):
    axes = np.array([[2, 1, 2], [-2, 2, 1]]) / 3  # no part of the normal is 0
    for i, distance in enumerate([12.5432, -3.0, 4.0, 40.0]):
        # the corner also wanders within the slice plane: z alone would mislead
        corner = np.round(distance * np.cross(*axes) + (-1) ** i * 100 * axes[1], 6)
        place = {"ImagePositionPatient": [*corner], "ImageOrientationPatient": [*axes.ravel()]}
        write_dicom(tmp_path / f"{i}.dcm", FLAT, InstanceNumber=i, **place)
    [volume], skipped, [(_, order), (series, warning)] = load(tmp_path)
    assert volume.files == ["1.dcm", "2.dcm", "0.dcm", "3.dcm"] and not skipped
    assert "InstanceNumber rises and falls along z" in order
    assert series == volume.name and "gaps along z: 1, the widest 27.5 mm" in warning
    assert [*map(float, volume.positions)] == pytest.approx([-3.0, 4.0, 12.5432, 40.0], abs=1e-3)
    assert volumes.gaps([0, 1, 9]) and not volumes.gaps([0, 9])  # one distance is the usual one


def test_series_are_grouped_by_uid_over_folders(tmp_path, write_dicom):
    """Without positions the InstanceNumber orders, then the name."""
    places = {f"x/{i}": ("1.2", i, [0, 0, -i]) for i in range(3)} | {"y/4": ("1.2", 0, [0, 0, 9])}
    places |= {"x/a": ("1.3", 10, None), "y/9": ("1.3", 9, None), "x/10": ("1.3", 9, None)}
    for name, (series, number, position) in places.items():
        tags = {"SeriesInstanceUID": series, "ImagePositionPatient": position}
        write_dicom(tmp_path / name, FLAT, InstanceNumber=number, **tags)
    grouped, _, _ = load(tmp_path)
    expected = [("1.2", ["x/2", "x/1", "x/0", "y/4"]), ("1.3", ["y/9", "x/10", "x/a"])]
    assert [(volume.name, volume.files) for volume in grouped] == expected
    assert grouped[1].positions == ["", "", ""]


def padding_to(limit, value=-1500):
    return {"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}


@pytest.mark.parametrize(
    "stored, intercept, tags, hu",
    [
        ([0, 1024, 2024, 4095], -1024, {}, [-1024, 0, 1000, 3071]),
        ([-24, 0, 1024, 2024], -1024, {}, [-1048, -1024, 0, 1000]),  # noise in air is no padding
        ([40000, 0, 0, 0], -1024, {}, [38976, -1024, -1024, -1024]),  # above the int16 range
        ([-2000, -1024, 0, 500], 0, {}, [-1000, -1024, 0, 500]),  # padding is air, not water
        ([-1500, 0, 40, 80], 0, {"PixelPaddingValue": -1500}, [-1000, 0, 40, 80]),
        ([-2000, 0, 1024, -2048], -1024, {}, [-1024, -1024, 0, -1024]),  # official: as a stored 0
        ([-900, 7, 40, 80], -1024, {"PixelPaddingValue": 64636}, [-1024, -1017, -984, -944]),
        ([0, 10, 20, 30], "-01.024000E+03", {"RescaleSlope": "2"}, [-1024, -1004, -984, -964]),
        ([0, 8192, 9192, 6192], -8192, {}, [-1024, 0, 1000, -1024]),  # Siemens: 0, or -2000 HU
        ([0, 8192, 9192, 1], -8192, {"PixelPaddingValue": 1}, [-1024, 0, 1000, -1024]),
        ([0, 1500, 2500, 600], -1500, {}, [-1024, 0, 1000, -900]),
        # -2000 is a value with the slope, with and without the intercept
        ([-1000, 0, 512, 1012], -1024, {"RescaleSlope": "2"}, [-1024, -1024, 0, 1000]),
        ([0, 4096, 4596, 3096], -8192, {"RescaleSlope": "2"}, [-1024, 0, 1000, -1024]),
        # a range holds both its ends (PS3.3 C.7.5.1.1.2); a limit of 0 makes none
        ([-1500, -1450, -1400, 80], 0, padding_to(-1400), [-1000, -1000, -1000, 80]),
        ([-1500, -1450, -1400, 80], 0, padding_to(-1500, -1400), [-1000, -1000, -1000, 80]),
        ([-1500, -500, 0, 80], 0, padding_to(0), [-1000, -500, 0, 80]),
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


@pytest.mark.parametrize("bits, high", [(12, 11), (12, 15), (10, 12), (15, 14), (16, 15), (9, 8)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.RLELossless,
        uid.JPEG2000Lossless,
    ],
)
def test_stored_values_are_the_bits_that_the_header_tells(
    tmp_path, write_dicom, bits, high, signed, syntax
):
    """Whatever, such as an overlay, the other bits hold; little-endian pixels without pydicom."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**16, (7, 5)).astype(np.uint16)
    values = (words >> (high + 1 - bits)).astype(int) % 2**bits
    if signed:
        values -= 2**bits * (values >= 2 ** (bits - 1))
    path = tmp_path / "a.dcm"
    tags = {"BitsStored": bits, "HighBit": high, "PixelRepresentation": int(signed)}
    write_dicom(path, words, **tags)
    dataset = pydicom.dcmread(path)
    dataset["PixelData"].VR = "OW"
    if syntax == uid.ExplicitVRBigEndian:
        dataset.PixelData = words.astype(">u2").tobytes()
    if syntax == uid.RLELossless:
        dataset.compress(syntax)
    if syntax == uid.JPEG2000Lossless:
        stream = io.BytesIO()
        Image.fromarray(words).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, dataset)
    header = dicom.read_header(path)
    if syntax == uid.JPEG2000Lossless and high + 1 != bits:
        assert "ambiguous" in header
        return
    plain = uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian
    assert (header.plain is not None) == (syntax in plain)
    assert (dicom.read_stored(path, header) == values).all()


@pytest.mark.parametrize(
    "element",
    [None, ("SS", -2000), ("US", 63536), ("DS", "-2000"), ("SS", [-2000] * 2), ("OW", b"0\xf8")],
)
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("sign", [0, 1])
def test_padding_of_any_type(tmp_path, write_dicom, element, bits, sign):
    """Or of none; also unsigned in 12 bits, which have no room for it."""
    words = np.array([[63536, 0], [1024, 1000]])
    tags = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": sign}
    write_dicom(tmp_path / "a.dcm", words, **tags)
    if element:
        dataset = pydicom.dcmread(tmp_path / "a.dcm")
        dataset.add_new("PixelPaddingValue", *element)
        dataset.save_as(tmp_path / "a.dcm")
    header = dicom.read_header(tmp_path / "a.dcm")
    stored = dicom.read_stored(tmp_path / "a.dcm", header)
    assert ct.stored_to_hu(stored, header).ravel().tolist() == [-1024, -1024, 0, -24]


def test_scaling_is_min_max_rounded_or_a_window():
    """Paper: min-max of each slice; a constant one is 0 (ours)."""
    values = np.array([-1024.0, 0.0, 1.0, 3071.0])
    min_max = [0, round(1024 / 4095 * 255), round(1025 / 4095 * 255), 255]
    assert ct.scale_to_uint8(values).tolist() == min_max
    assert ct.scale_to_uint8(values, (40, 400)).tolist() == [0, 102, round(161 / 400 * 255), 255]
    assert ct.scale_to_uint8(np.full(2, 7.0)).tolist() == [0, 0]


SAME, APART, BETWEEN = (0, 5), (4, 1), (1, 3)  # mm from scan to scan, and from slice to slice
NEAR, SHIFTED, THIN, STATIONS = (0.0006, 5), (5, 5), (2.5, 0.625), (10.5, 4)
RESTARTS = {"InstanceNumber": "{i}", "path": "{mixed}"}
BY, DIFFER = "3 scans of one place, told apart by ", "study differ: 3 or more volumes"
BY_ORDER = f"{BY}the order of InstanceNumber, acquisition and name alone: a guess, look"
PARTLY = {"InstanceNumber": "{i}", "AcquisitionNumber": "{scan}"}
ALONE = {"SeriesInstanceUID": "1.2.{scan}{i}", "path": "{scan}{i}/"}  # in folders of their own
RANDOM = {"SeriesInstanceUID": "1.2.{scan}{i}", "StudyInstanceUID": "1.3.{scan}{i}"}


@pytest.mark.parametrize(
    "z, tags, number, warning",
    [
        (SAME, {"SOPInstanceUID": "1.9"}, 3, "12 slices have 1 different SOPInstanceUIDs"),
        (SAME, RESTARTS | {"SOPInstanceUID": "1.9", "path": "{scan}/"}, 3, f"{BY}folder"),
        (SAME, {"SOPInstanceUID": "1.9.{i}"}, 3, "12 slices have 4 different SOPInstanceUIDs"),
        (SAME, PARTLY | {"SOPInstanceUID": "1.9.{i}"}, 3, "12 slices have 4 different SOP"),
        (SAME, {"TemporalPositionIdentifier": "{scan}"}, 3, f"{BY}TemporalPositionIdentifier"),
        (SAME, {"AcquisitionNumber": "{scan}"}, 3, f"{BY}AcquisitionNumber"),
        (SAME, {"AcquisitionTime": "10150{scan}.5"}, 3, f"{BY}AcquisitionTime"),
        (SAME, RESTARTS | {"SeriesNumber": "{scan}"}, 3, f"{BY}SeriesNumber"),
        (SAME, {"ConvolutionKernel": "B{scan}0"}, 3, f"{BY}ConvolutionKernel"),
        (SAME, {"AcquisitionTime": "10150{i}.{scan}"}, 3, BY_ORDER),
        (SAME, {"AcquisitionTime": "1{mixed}50{i}"}, 3, BY_ORDER),  # InstanceNumber before time
        (SAME, RESTARTS | {"AcquisitionTime": "1{scan}50{i}"}, 3, BY_ORDER),
        (SHIFTED, RESTARTS | {"path": "{scan}/"}, 3, f"{BY}folder"),
        (SAME, {"path": "{scan}{odd}/"}, 3, BY_ORDER),  # half a scan in each
        (SAME, {"InstanceNumber": "1"}, 3, BY_ORDER),
        (NEAR, {}, 3, BY_ORDER),
        (SAME, {"PatientID": "Geheim {scan}"}, 3, DIFFER),
        (BETWEEN, {"PatientName": "Geheim^{scan}"}, 3, DIFFER),
        (BETWEEN, {"PatientBirthDate": "1900011{scan}"}, 3, DIFFER),
        (BETWEEN, {"StudyInstanceUID": "1.{scan}", "InstanceNumber": "1"}, 3, DIFFER),
        (BETWEEN, {"AcquisitionNumber": "{scan}"}, 3, f"{BY}AcquisitionNumber"),
        (BETWEEN, {"InstanceNumber": "{i}"}, 1, "InstanceNumber repeats, 4 on 12 slices"),
        (BETWEEN, {}, 1, "InstanceNumber rises and falls along z: perhaps they are several scans"),
        (APART, {"AcquisitionNumber": "{scan}"}, 1, None),
        (APART, {"AcquisitionNumber": "{odd}"}, 1, None),
        (APART, {"InstanceNumber": "1"}, 1, None),
        (APART, {"PatientID": "7{blanks}"}, 1, None),  # DICOM pads text to an even length
        (APART, {"ImageOrientationPatient": r"1\0.00{i}\0\0\1\0"}, 1, None),
        (THIN, {}, 1, None),
        (STATIONS, {"AcquisitionNumber": "{scan}"}, 1, "InstanceNumber rises and falls along z"),
        (APART, RANDOM, 12, "12 series of one slice"),
        (APART, {"SeriesInstanceUID": "1.2.{scan}{i}"}, 12, "12 series of one slice"),
        (APART, ALONE, 12, "12 series of one slice"),
    ],
)
def test_a_volume_is_one_acquisition_of_one_patient(
    tmp_path, write_dicom, z, tags, number, warning
):
    """Each file's name ends in the scan, of three, and the place within it, of four."""
    names = [f"{scan}{i}" for scan in range(3) for i in range(4)]
    for n, name in enumerate(names):
        scan, i = map(int, name)
        place = {"ImagePositionPatient": [0, 0, z[0] * scan + z[1] * i], "InstanceNumber": n}
        words = {"scan": scan, "i": i, "mixed": (scan + i) % 3, "odd": i % 2 or ""}
        words["blanks"] = i % 2 * "   "
        told = {tag: text.format(**words) for tag, text in tags.items()}
        write_dicom(tmp_path / "some" / (told.pop("path", "") + name), FLAT, **place | told)
    grouped, skipped, warnings = load(tmp_path)
    files = [[file[-2:] for file in volume.files] for volume in grouped]
    assert not skipped and len(grouped) == number and sorted(sum(files, [])) == names
    if number == 3:
        assert files == [names[:4], names[4:8], names[8:]]
        assert [volume.name for volume in grouped] == ["1.2.3", "1.2.3 2", "1.2.3 3"]
    said = [f"{volume}: {text}" for volume, text in warnings]
    assert all(": in DATA/some: " in text and "Geheim" not in text for text in said)
    assert any(warning in text for text in said) if warning else not said


def test_slices_of_one_uid_without_a_place_are_no_copies(tmp_path, write_dicom):
    unknown = {"InstanceNumber": None, "ImagePositionPatient": None}
    for name in "ab":
        write_dicom(tmp_path / name, FLAT, SOPInstanceUID="1.9", **unknown)
    [volume], skipped, _ = load(tmp_path)
    assert volume.files == ["a", "b"] and not skipped


@pytest.mark.parametrize(
    "names, expected, warning",
    [
        ("one/p_1 one/p_2", {"one": "1 2"}, None),
        ("p1_10 p1_2 p1_0 p_2_1", {"p1": "0 2 10", "p_2": "1"}, None),
        ("scan/slice10 scan/slice9", {"scan": "9 10"}, None),
        ("two/a_1 two/b_1", {"two": "1 1"}, "1 last number(s) in 2 names: ordered by all"),
        ("w/01_0 w/02_1 w/03_0", {"w": "0 1 0"}, "2 last number(s) in 3 names"),
        ("a_1 b_2", {".": "1 2"}, "in DATA: 1 volume, not 2 by file name (a, b ...), 2 of one"),
        ("a1 a2 b1 b2 c1 d1", {"a": "1 2", "b": "1 2", "c": "1", "d": "1"}, "4 volumes by file"),
        ("a-1 a-2 b-3 b-4 c-5 d-6 e-7 f-8", {".": "1 2 3 4 5 6 7 8"}, "1 volume, not 6"),
        ("p-0 p-1 q-2 q-3", {"p": "0 1", "q": "2 3"}, "2 volumes by file name (p, q ...), 0"),
        ("1.2.0.1 1.2.1.2 1.2.0.3 1.2.1.4", {"1.2.0": "1 3", "1.2.1": "2 4"}, "2 volumes"),
        ("p/7 p_1 p_2 q_1 q_2 p~2/8", {"p": "7", "p 2": "1 2", "p 2 2": "8", "q": "1 2"}, None),
        ("v/s~-1 v/s~-2", {"v": "1 2"}, None),
        ("v/z_2.5mm v/z_10.0mm v/z_5.0mm", {"v": "2.5 5.0 10.0"}, None),
        ("v/s10_w400 v/s7_w400", {"v": "400 400"}, "1 last number(s) in 2 names"),
        ("v/z_-10 v/z_-5 v/z_0", {"v": "-10 -5 0"}, None),
        ("v/1.2.840.10 v/1.2.840.9", {"v": "9 10"}, None),
        (
            "a_1 a_2 b_3 b_4 view",
            {"a": "1 2", "b": "3 4", "view": ""},
            "3 volumes by file name (a, b",
        ),
        ("c/P-001 c/P-002 c/Q-001 c/Q-002", {"c/P": "1 2", "c/Q": "1 2"}, "2 volumes"),
        ("P_3_85_CT P_3_9_CT P_12_85_CT P_12_9_CT", {"P_12_CT": "9 85", "P_3_CT": "9 85"}, "2 vol"),
        ("t/1-1 t/2-1 t/2-1x", {"t": "1 1 1"}, "1 last number(s) in 3 names"),
        ("v/mid v/2", {"v": "2 "}, "1 last number(s) in 2 names"),  # no number: last
        ("t/b t/a", {"t": " "}, "0 last number(s) in 2 names"),
        ("t/1-2 t/2-1", {"t": "1 2"}, "of several numbers in the names, the last"),
    ],
)
def test_names_of_pictures_tell_volumes_and_their_order(names, expected, warning):
    """A folder is a volume, or the authors' flat layout; positions are the numbers, in order."""
    grouped, _, warnings = load(".", [f"{name}.png".replace("~", " ") for name in names.split()])
    if "w400" in names:
        assert grouped[0].files == ["v/s7_w400.png", "v/s10_w400.png"]
    assert {volume.name: " ".join(volume.positions) for volume in grouped} == expected
    assert warning in warnings[0][1] if warning else not warnings
