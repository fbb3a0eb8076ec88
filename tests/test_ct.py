import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from common import ct, dicom, volumes


def load(folder):
    return volumes.find_volumes(folder, [file for file, _, _ in volumes.list_files(folder)])


def test_slices_are_ordered_along_the_normal_of_a_tilted_series(tmp_path, write_dicom):
    axes = np.array([[1, 0, 0], [0, np.cos(0.3), np.sin(0.3)]])
    normal = np.cross(*axes)
    distances = [12.5, -3.0, 4.0, 40.0]
    for i, distance in enumerate(distances):
        # the corner also wanders within the slice plane: z alone would mislead
        corner = distance * normal + (-1) ** i * 100 * axes[1]
        place = {
            "ImagePositionPatient": list(np.round(corner, 6)),
            "ImageOrientationPatient": list(axes.ravel()),
        }
        write_dicom(tmp_path / f"{i}.dcm", np.full((4, 4), i), InstanceNumber=i, **place)
    [volume], skipped, [(uid, warning)] = load(tmp_path)
    assert volume.files == ["1.dcm", "2.dcm", "0.dcm", "3.dcm"] and not skipped
    assert uid == volume.name and "1 gap along z, the widest 27.5 mm" in warning
    assert np.allclose([float(p) for p in volume.positions], sorted(distances), atol=1e-3)


def test_without_positions_the_instance_number_orders_then_the_name(tmp_path, write_dicom):
    for name, number in [("a", 10), ("b", 9), ("c", 9)]:
        write_dicom(
            tmp_path / name, np.zeros((4, 4), int), InstanceNumber=number, ImagePositionPatient=None
        )
    [volume], _, [(_, warning)] = load(tmp_path)
    assert "3 of 3 slices have no position" in warning and "file name" in warning
    assert volume.files == ["b", "c", "a"] and volume.positions == ["", "", ""]


def test_series_are_grouped_by_uid_over_folders(tmp_path, write_dicom):
    for i, (folder, uid) in enumerate([("x", "1.2"), ("y", "1.2"), ("x", "1.3")]):
        write_dicom(
            tmp_path / folder / f"{i}",
            np.zeros((4, 4), int),
            SeriesInstanceUID=uid,
            ImagePositionPatient=[0, 0, i],
        )
    found, _, warnings = load(tmp_path)
    assert not warnings and [(v.name, v.files) for v in found] == [
        ("1.2", ["x/0", "y/1"]),
        ("1.3", ["x/2"]),
    ]


@pytest.mark.parametrize(
    "stored, tags, hu",
    [
        ([[0, 1024], [2024, 4095]], {}, [[-1024, 0], [1000, 3071]]),
        ([[40000, 0], [0, 0]], {}, [[38976, -1024], [-1024, -1024]]),  # above the int16 range
        (
            [[-2000, -1024], [0, 500]],
            {"RescaleIntercept": 0},
            [[-1000, -1024], [0, 500]],
        ),  # padding is air, not water
        (
            [[-2000, 0], [1024, -2048]],
            {},
            [[-1024, -1024], [0, -1024]],
        ),  # official code: a stored 0
        (
            [[-1500, 0], [40, 80]],
            {"RescaleIntercept": 0, "PixelPaddingValue": -1500},
            [[-1000, 0], [40, 80]],
        ),
        (
            [[-900, 7], [40, 80]],
            {"PixelPaddingValue": 64636},
            [[-1024, -1017], [-984, -944]],
        ),  # -900 written unsigned
        (
            [[0, 10], [20, 30]],
            {"RescaleSlope": "2", "RescaleIntercept": "-01.024000E+03"},
            [[-1024, -1004], [-984, -964]],
        ),
    ],
)
def test_hu(tmp_path, write_dicom, stored, tags, hu):
    write_dicom(tmp_path / "a.dcm", stored, **tags)
    header = dicom.read_header(tmp_path / "a.dcm")
    read = dicom.read_stored(tmp_path / "a.dcm", header)
    assert ct.stored_to_hu(read, header).tolist() == hu


@pytest.mark.parametrize("padding", [None, (-900, -800)])
@pytest.mark.parametrize("window", [None, (40, 400)])
@pytest.mark.parametrize("low, high", [(-1024, 3000), (-32768, 32767), (0, 65535), (-2048, 3)])
def test_the_table_of_grey_values_is_the_plain_formula(padding, window, low, high):
    header = dicom.Header("", "", None, None, None, 40, 30, 1.5, -1024.0, padding)
    stored = np.random.default_rng(0).integers(low, high + 1, (40, 30))
    stored = stored.astype(np.int16 if low < 0 else np.uint16)
    expected = ct.scale_to_uint8(ct.stored_to_hu(stored.astype(int), header), window)
    assert (ct.stored_to_uint8(stored, header, window) == expected).all()


@pytest.mark.parametrize("bits", [12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_stored_values_are_those_of_pydicom(tmp_path, write_dicom, bits, signed, syntax):
    stored = np.random.default_rng(0).integers(
        -30000 if signed else 0, 30000 if signed else 60000, (7, 5)
    )
    write_dicom(
        tmp_path / "a.dcm", stored, BitsStored=bits, HighBit=bits - 1
    )  # anything in the unused high bits
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(
        tmp_path / "b.dcm",
        dataset,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
    )
    header = dicom.read_header(tmp_path / "b.dcm")
    assert (header.pixels is None) == (syntax == ExplicitVRBigEndian)  # both ways are taken
    expected = pydicom.dcmread(tmp_path / "b.dcm").pixel_array
    assert (dicom.read_stored(tmp_path / "b.dcm", header) == expected).all()
    assert (dicom.read_stored(tmp_path / "b.dcm", header._replace(pixels=None)) == expected).all()


def test_scaling_is_min_max_rounded_or_a_window():
    values = np.array([[-1024.0, 0.0], [1.0, 3071.0]])
    assert ct.scale_to_uint8(values).tolist() == [
        [0, round(1024 / 4095 * 255)],
        [round(1025 / 4095 * 255), 255],
    ]
    assert ct.scale_to_uint8(values, (40, 400)).tolist() == [
        [0, 102],
        [round(161 / 400 * 255), 255],
    ]
    assert ct.scale_to_uint8(np.full((2, 2), 7.0)).tolist() == [[0, 0], [0, 0]]


def test_image_folders_and_the_flat_layout_of_the_authors(tmp_path):
    names = [
        "p1_0.png",
        "p1_10.png",
        "p1_2.png",
        "p_2_1.png",
        "scan/slice9.png",
        "scan/slice10.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / name)
    found, skipped, _ = load(tmp_path)
    assert not skipped
    assert [(v.name, v.files, v.positions) for v in found] == [
        ("p1", ["p1_0.png", "p1_2.png", "p1_10.png"], ["0", "2", "10"]),
        ("p_2", ["p_2_1.png"], ["1"]),
        ("scan", ["scan/slice9.png", "scan/slice10.png"], ["9", "10"]),
    ]
