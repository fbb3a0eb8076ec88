"""Hard inputs: each is read right, or skipped with a reason that is true.

Every file ends as a slice or as a skipped one.
"""

import io
import os
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from common import ct, toy, volumes
from common.dicom import read_header
from common.store import read_lines

PIXELS = np.random.default_rng(0).integers(0, 4000, (24, 20))


def outcome(folder):
    """({file: its 8-bit slice}, {file: reason}, [warning]) of all files below folder."""
    files = [file for file, _, _ in volumes.list_files(folder)]
    found, skipped, warnings = volumes.find_volumes(folder, files)
    slices, reasons = {}, dict(skipped)
    assert len(reasons) == len(skipped)
    for volume in found:
        for file, header in zip(volume.files, volume.headers):
            try:
                slices[file] = ct.read_slice(folder / file, None, header)
            except ct.Unusable as error:
                reasons[file] = str(error)
    assert sorted([*slices, *reasons]) == sorted(files) and all(reasons.values())
    return slices, reasons, [text for _, text in warnings]


@pytest.mark.parametrize(
    "tags, message",
    [
        ({"Modality": "MR"}, "Modality is MR, not CT"),
        ({"Modality": "PT"}, "Modality is PT, not CT"),
        ({"Modality": "SR"}, "Modality is SR, not CT"),
        ({"Modality": "RTDOSE"}, "Modality is RTDOSE, not CT"),
        ({"Modality": None}, "Modality is missing"),
        ({"RescaleSlope": None}, "RescaleSlope is missing"),
        ({"RescaleIntercept": ""}, "RescaleIntercept is missing"),
        ({"RescaleSlope": 0}, "does not give HU"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCOUT MODE"]}, "a localizer"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "PhotometricInterpretation is MONOCHROME1"),
        ({"NumberOfFrames": 3}, "a multi-frame image"),
        ({"SeriesInstanceUID": None}, "SeriesInstanceUID is missing"),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
        ({"PixelData": None}, "has no pixel data"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels"),
        ({"Rows": 0}, "0 x 20 pixels"),
        ({"Rows": 25}, "pixel data is cut short: 480 of 500 values"),
        ({"BitsStored": None}, "pixels cannot be decoded"),
    ],
)
def test_a_dicom_file_that_is_no_ct_slice(tmp_path, write_dicom, tags, message):
    write_dicom(tmp_path / "bad.dcm", PIXELS, **tags)
    slices, reasons, _ = outcome(tmp_path)
    assert not slices and message in reasons["bad.dcm"]


@pytest.mark.parametrize("value", [b"abcd", b"nan ", b"inf ", b"-1.0", b"    ", b"0\\1 "])
def test_a_rescale_that_is_no_number_is_never_guessed(tmp_path, write_dicom, value):
    write_dicom(tmp_path / "bad.dcm", PIXELS, RescaleSlope="1.25")
    complete = (tmp_path / "bad.dcm").read_bytes()
    assert complete.count(b"1.25") == 1
    (tmp_path / "bad.dcm").write_bytes(complete.replace(b"1.25", value))
    reason = outcome(tmp_path)[1]["bad.dcm"]
    assert "does not give HU" in reason or "cannot be brought to HU" in reason


def test_files_that_are_something_else(tmp_path, write_dicom):
    write_dicom(tmp_path / "good.dcm", PIXELS)
    complete = (tmp_path / "good.dcm").read_bytes()
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "notes.dcm").write_text("no image, but long enough to be read as one" * 10)
    Image.fromarray(PIXELS.astype(np.uint8)).save(tmp_path / "png.dcm", "PNG")
    (tmp_path / "text.png").write_text("no image")
    # the same instance as good.dcm, and first, but of no use
    (tmp_path / "cut.dcm").write_bytes(complete[:-100])
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2"
    directory.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    for length in range(100, len(complete) - 2 * PIXELS.size, 50):
        (tmp_path / f"header{length}.dcm").write_bytes(complete[:length])
    slices, reasons, _ = outcome(tmp_path)
    assert list(slices) == ["good.dcm"]
    expected = {
        "empty.dcm": "an empty file",
        "notes.dcm": "not a DICOM file",
        "png.dcm": "a PNG or JPEG by its content",
        "text.png": "not a PNG or JPEG",
        "cut.dcm": "pixel data is cut short: 430 of 480 values",
        "gone": "No such file",
        "pipe": "not a regular file",
        "DICOMDIR": "a DICOMDIR",
    }
    for file, message in expected.items():
        assert message in reasons[file]


def compressed(path, syntax, data):
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([data])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)


def test_compressed_slices_are_read_or_name_the_plug_in(tmp_path, write_dicom, run):
    """RLE and JPEG 2000 are lossless; JPEG is 8 bit and lossy; nothing here decodes JPEG-LS."""
    for i, name in enumerate(["plain", "rle", "j2k", "jpeg", "jls1", "jls2"]):
        uid = "1.2.4" if name.startswith("jls") else "1.2.3"
        write_dicom(
            tmp_path / "ct" / name,
            PIXELS,
            InstanceNumber=i,
            ImagePositionPatient=[0, 0, i],
            SeriesInstanceUID=uid,
        )
    dataset = pydicom.dcmread(tmp_path / "ct" / "rle")
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "ct" / "rle", enforce_file_format=True)
    stream = io.BytesIO()
    Image.fromarray(PIXELS.astype(np.uint16)).save(
        stream, "JPEG2000", no_jp2=True, irreversible=False
    )
    compressed(tmp_path / "ct" / "j2k", JPEG2000Lossless, stream.getvalue())
    smooth = np.add.outer(np.arange(24), np.arange(20)).astype(np.uint8)
    write_dicom(
        tmp_path / "ct" / "jpeg",
        smooth,
        InstanceNumber=3,
        ImagePositionPatient=[0, 0, 3],
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=100)
    compressed(tmp_path / "ct" / "jpeg", JPEGBaseline8Bit, stream.getvalue())
    dataset = pydicom.dcmread(tmp_path / "ct" / "j2k")
    dataset.Rows = 12  # less than its stream says
    dataset.ImagePositionPatient = [0, 0, 9]
    dataset.SOPInstanceUID = dataset.SeriesInstanceUID = "1.9"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.9"
    dataset.save_as(tmp_path / "ct" / "larger", enforce_file_format=True)
    rle = (tmp_path / "ct" / "rle").read_bytes()
    (tmp_path / "ct" / "rle cut").write_bytes(rle[:-100])
    for name in ("jls1", "jls2"):
        compressed(tmp_path / "ct" / name, JPEGLSLossless, b"\xff\xd8\xff\xf7\0\0")
    slices, reasons, _ = outcome(tmp_path / "ct")
    assert (slices["rle"] == slices["plain"]).all()
    assert (slices["j2k"] == slices["plain"]).all()
    assert np.abs(slices["jpeg"].astype(int) - ct.scale_to_uint8(smooth)).max() <= 8
    assert "decompression bomb" in reasons.pop("larger")
    assert "cut short" in reasons.pop("rle cut")
    assert reasons.keys() == {"jls1", "jls2"}
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in reasons["jls1"]
    shown = run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "hash").stdout
    assert shown.count("pip install") == 1 and "2 skipped: JPEG-LS" in shown


def test_slices_that_are_unusual_but_fine(tmp_path, write_dicom):
    """Deflated, or without a PhotometricInterpretation, or with something after the pixels."""
    smooth = np.add.outer(np.arange(24), np.arange(20)) // 4  # much smaller when deflated
    for i, name in enumerate(["plain", "deflated", "photometric", "trailing"]):
        write_dicom(tmp_path / name, smooth, ImagePositionPatient=[0, 0, i])
    dataset = pydicom.dcmread(tmp_path / "deflated")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated", enforce_file_format=True)
    dataset = pydicom.dcmread(tmp_path / "photometric")
    del dataset.PhotometricInterpretation
    dataset.save_as(tmp_path / "photometric", enforce_file_format=True)
    dataset = pydicom.dcmread(tmp_path / "trailing")
    dataset.DataSetTrailingPadding = b"\0" * 1000
    dataset.save_as(tmp_path / "trailing", enforce_file_format=True)
    slices, reasons, _ = outcome(tmp_path)
    assert not reasons
    assert all((slice8 == slices["plain"]).all() for slice8 in slices.values())


def series(write_dicom, folder, n=5, **tags):
    for i in range(n):
        geometry = {"ImagePositionPatient": [0, 0, 2.5 * i], "InstanceNumber": n - i, **tags}
        write_dicom(folder / f"{i}.dcm", PIXELS + i, **geometry)


def test_the_odd_ones_of_a_series_are_left_out(tmp_path, write_dicom):
    series(write_dicom, tmp_path)
    sagittal = {"ImagePositionPatient": [0, 0, 1], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    write_dicom(tmp_path / "scout.dcm", PIXELS, **sagittal)
    write_dicom(tmp_path / "small.dcm", PIXELS[:8, :8], ImagePositionPatient=[0, 0, 1])
    write_dicom(
        tmp_path / "again" / "2.dcm", PIXELS, ImagePositionPatient=[0, 0, 5], InstanceNumber=99
    )
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "1.dcm").read_bytes())
    slices, reasons, warnings = outcome(tmp_path)
    assert list(slices) == [f"{i}.dcm" for i in range(5)] and not warnings
    assert reasons == {
        "scout.dcm": "orientation unlike most of its series",
        "small.dcm": "8 x 8 pixels, unlike most of its series",
        "again/2.dcm": "same position as 2.dcm",
        "copy.dcm": "same SOPInstanceUID as 1.dcm",
    }


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            {3: {"ImagePositionPatient": None}},
            "1 of 6 slices have no position: ordered by InstanceNumber",
        ),
        (
            {3: {"ImageOrientationPatient": None}},
            "1 of 6 slices have no position: ordered by InstanceNumber",
        ),
        (
            {i: {"ImagePositionPatient": [0, 0, 7]} for i in range(6)},
            "all 6 slices have the same position",
        ),
        (
            {i: {"ImageOrientationPatient": [0] * 6} for i in range(6)},
            "6 of 6 slices have no position",
        ),
        (
            {2: {"SeriesInstanceUID": "1.2.9"}},
            "1 gap along z, the widest 5.0 mm where 2.5 mm is usual",
        ),
        ({2: {"InstanceNumber": 99}}, None),
    ],
)
def test_broken_geometry_is_warned_of(tmp_path, write_dicom, harm, message):
    for i in range(6):
        geometry = {"ImagePositionPatient": [0, 0, 2.5 * i], "InstanceNumber": i} | harm.get(i, {})
        write_dicom(tmp_path / f"{5 - i}.dcm", PIXELS, **geometry)
    slices, reasons, warnings = outcome(tmp_path)
    assert not reasons and (message in " ".join(warnings) if message else not warnings)
    if "SeriesInstanceUID" not in harm.get(2, {}):
        assert list(slices) == [f"{5 - i}.dcm" for i in range(6)]


def test_pictures_give_their_grey_values(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = np.stack([grey, grey[::-1], grey.T], 2)
    luma = np.rint(colour @ [0.299, 0.587, 0.114])
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(np.array([[0, 300], [600, 60000]], np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([colour, grey])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([grey, grey.T])).save(tmp_path / "la.png")
    palette = Image.fromarray(grey)
    palette.putpalette([255 - i // 3 for i in range(768)])  # index i is the grey 255 - i
    palette.save(tmp_path / "palette.png")
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    slices, reasons, _ = outcome(tmp_path)
    assert not reasons and slices["deep.png"].tolist() == [[0, 1], [3, 255]]
    for name in ("l.png", "la.png"):
        assert (slices[name] == grey).all()
    for name in ("rgb.png", "rgba.png"):
        assert np.abs(slices[name] - ct.scale_to_uint8(luma).astype(int)).max() <= 1
    assert (slices["palette.png"] == 255 - grey).all() and (
        slices["bits.png"] == (grey > 100) * 255
    ).all()


def test_bombs_and_broken_pictures_are_skipped(tmp_path):
    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    size = (60_000).to_bytes(4, "big")
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + size + b"\x08\0\0\0\0")
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
    )
    (tmp_path / "bomb.png").write_bytes(bomb + chunk(b"IEND", b""))
    stream = io.BytesIO()
    Image.fromarray(PIXELS.astype(np.uint8)).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:-200])
    (tmp_path / "head.jpg").write_bytes(stream.getvalue()[:20])
    slices, reasons, _ = outcome(tmp_path)
    assert not slices and "larger than a slice may be" in reasons["bomb.png"]
    assert "cannot be decoded" in reasons["cut.jpg"] and reasons["head.jpg"]


def test_values_that_are_not_finite_are_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(ct.Unusable, match="not finite"):
            ct.scale_to_uint8(np.array([[0, value]]))


@pytest.mark.parametrize("strategy", ["hash", "ssim", "mi"])
def test_sizes_from_1_to_4096_and_constant_slices(
    tmp_path, write_dicom, run, monkeypatch, strategy
):
    """One-slice series each, but for two constant slices, which are alike by every measure."""
    monkeypatch.setenv("PYTHONWARNINGS", "error::RuntimeWarning")
    for i, side in enumerate([1, 2, 16, 4096]):
        ramp = np.add.outer(np.arange(side), np.arange(side)) % 4000
        write_dicom(tmp_path / "ct" / f"{side}", ramp, SeriesInstanceUID=f"1.2.{i}")
    for z in (0, 1):
        write_dicom(
            tmp_path / "ct" / f"flat{z}",
            np.full((16, 16), 7),
            SeriesInstanceUID="1.3",
            ImagePositionPatient=[0, 0, z],
        )
    run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", strategy, "--workers", 2)
    slices = np.load(tmp_path / "out" / "slices.npy")
    assert slices.shape == (6, 224, 224) and (slices[-2:] == 0).all()
    [selection] = [
        file for file in (tmp_path / "out").glob("*.csv") if file.stem not in ("slices", "skipped")
    ]
    assert [line.split(",")[1] for line in selection.read_text().splitlines()[-2:]] == ["1", "0"]


def test_a_dirty_tree_is_listed_file_by_file(tmp_path, write_dicom, run):
    """Odd names, links in a circle, and patient data that must stay out of every output."""
    secret = "Geheim^Person"
    names = [
        "with space",
        "quote\"'",
        "new\nline",
        "carriage\rreturn",
        "umläut",
        os.fsdecode(b"latin\xe4"),
        "comma,name",
        "-flag",
    ]
    for i, name in enumerate(names):
        geometry = {
            "ImagePositionPatient": [0, 0, i],
            "PatientName": secret,
            "PatientBirthDate": "19010203",
            "PatientID": secret,
        }
        write_dicom(tmp_path / "ct" / f"{name} dir" / name, PIXELS + 100 * i, **geometry)
    write_dicom(
        tmp_path / "ct" / "bad", PIXELS, PatientName=secret, PatientID=secret, RescaleSlope=None
    )
    complete = (tmp_path / "ct" / "bad").read_bytes()
    for i in range(200, len(complete), 60):
        (tmp_path / "ct" / f"cut {i}").write_bytes(complete[:i])
    (tmp_path / "ct" / "circle").symlink_to(".", target_is_directory=True)
    (tmp_path / "ct" / "knot").symlink_to("knot")
    done = run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "hash")
    text = "".join(
        file.read_text(errors="surrogateescape") for file in (tmp_path / "out").glob("*.[cj]s*")
    )
    assert all(
        word not in text + done.stdout + done.stderr for word in (secret, "Geheim", "19010203")
    )
    listed = [
        line["file"]
        for name in ("slices", "skipped")
        for line in read_lines(tmp_path / "out" / f"{name}.csv")
    ]
    used = {line["file"] for line in read_lines(tmp_path / "out" / "slices.csv")}
    assert sorted(listed) == sorted({file for file, _, _ in volumes.list_files(tmp_path / "ct")})
    assert used == {f"{name} dir/{name}" for name in names}


def test_all_files_that_pydicom_ships(tmp_path, run):
    """Over 200, many broken on purpose: the 12 single-frame CT slices with a rescale are used."""
    folder = os.path.join(os.path.dirname(pydicom.__file__), "data")
    files = [file for file, _, _ in volumes.list_files(folder)]
    run("reduce.py", folder, tmp_path / "out", "--strategy", "hash")
    lines = {
        name: (tmp_path / "out" / f"{name}.csv").read_text().splitlines()[1:]
        for name in ("slices", "skipped")
    }
    assert len(files) > 200 and len(lines["slices"]) + len(lines["skipped"]) == len(files)
    by_hand = set()
    for file in files:
        try:
            dataset = pydicom.dcmread(os.path.join(folder, file))
            if (
                dataset.Modality == "CT"
                and "RescaleSlope" in dataset
                and "LOCALIZER" not in dataset.ImageType
            ):
                by_hand.add(file)
        except Exception:
            assert isinstance(read_header(os.path.join(folder, file)), str)
    assert {line.split(",")[3] for line in lines["slices"]} == by_hand


def test_damaged_slices_are_used_or_listed(tmp_path, run):
    """tests/fuzz.py does this with thousands of them."""
    toy.write_cohort(tmp_path, patients=2, slices=3)
    done = run("tests/fuzz.py", tmp_path, "--mutants", 30)
    assert done.stdout.startswith("30 mutants: ")
