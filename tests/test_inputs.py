"""Hard inputs: each is read right, or skipped with a reason that is true.

Every file ends as a slice or as a skipped one.
"""

import io
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from common import ct, toy, volumes
from common.files import read_json
from common.store import read_lines

PIXELS = np.random.default_rng(0).integers(0, 4000, (24, 20))


def outcome(folder):
    """({file: its 8-bit slice}, {file: reason}, [warning]) of all files below folder."""
    files = [file for file, _, _ in volumes.list_files(folder)]
    in_order, skipped, warnings = volumes.find_volumes(folder, files)
    slices, reasons = {}, dict(skipped)
    assert len(reasons) == len(skipped)
    for volume in in_order:
        for file, header in zip(volume.files, volume.headers, strict=True):
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
        ({"RescaleSlope": None}, "gives no HU"),
        ({"RescaleIntercept": ""}, "gives no HU"),
        ({"RescaleSlope": 0}, "gives no HU"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCOUT MODE"]}, "a localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "TOPOGRAM"]}, "a localizer"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "PhotometricInterpretation is MONOCHROME1"),
        ({"NumberOfFrames": 3}, "a multi-frame image"),
        ({"SeriesInstanceUID": None}, "SeriesInstanceUID is missing"),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
        ({"PixelData": None}, "has no pixel data"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels"),
        ({"Rows": 0}, "0 x 20 pixels"),
        ({"Rows": 25}, "pixel data is cut short: 480 of 500 values"),
        ({"BitsStored": None}, "no layout of pixels"),
        ({"BitsStored": 12, "HighBit": 10}, "no layout of pixels"),
        ({"BitsStored": 12, "HighBit": 15}, "the values lie in the lowest 12 bits"),
        ({"SamplesPerPixel": 3, "Rows": 8, "PlanarConfiguration": 0}, "3 dimensions"),
    ],
)
def test_a_dicom_file_that_is_no_ct_slice(tmp_path, write_dicom, tags, message):
    write_dicom(tmp_path / "bad.dcm", PIXELS, **tags)
    slices, reasons, _ = outcome(tmp_path)
    assert not slices and message in reasons["bad.dcm"]


def test_a_rescale_that_is_no_number_is_never_guessed(tmp_path, write_dicom):
    write_dicom(tmp_path / "0.dcm", PIXELS, RescaleSlope="1.25")
    good = (tmp_path / "0.dcm").read_bytes()
    for i, value in enumerate([b"abcd", b"nan ", b"inf ", b"-1.0", b"    ", b"0\\1 "]):
        (tmp_path / f"{i}.dcm").write_bytes(good.replace(b"1.25", value))
    slices, reasons, _ = outcome(tmp_path)
    assert not slices and all("gives no HU" in reason for reason in reasons.values())


def test_files_that_are_something_else(tmp_path, write_dicom):
    write_dicom(tmp_path / "good.dcm", PIXELS)
    complete = (tmp_path / "good.dcm").read_bytes()
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    directory = ("MediaStorageSOPClassUID", uid.MediaStorageDirectoryStorage)
    (tmp_path / "DICOMDIR").write_bytes(complete)
    edit(tmp_path / "DICOMDIR", lambda dataset: setattr(dataset.file_meta, *directory))
    contents = {
        "png.dcm": jpeg(PIXELS.astype(np.uint8), "PNG"),
        "notes.dcm": b"no image, but long enough to be read as one" * 10,
        "text.png": b"no image",
        "cut.dcm": complete[:-100],  # the instance of good.dcm, and first, but of no use
    }
    lengths = range(0, len(complete) - 2 * PIXELS.size, 50)
    contents |= {f"header{length}.dcm": complete[:length] for length in lengths}
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    slices, reasons, warnings = outcome(tmp_path)
    assert list(slices) == ["good.dcm"]
    assert warnings == ["in DATA: pictures beside DICOM: volumes of their own"]
    assert "no picture" in reasons["text.png"] and "a DICOMDIR" in reasons["DICOMDIR"]
    assert reasons["cut.dcm"] == "pixel data is cut short: 430 of 480 values"
    assert "No such file" in reasons["gone"] and "not a regular file" in reasons["pipe"]
    for file in ("header0.dcm", "notes.dcm", "png.dcm"):
        assert "not a DICOM file" in reasons[file]


def jpeg(pixels, encoding, **settings):
    """The bytes of a picture."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, encoding, **settings)
    return stream.getvalue()


def edit(path, change):
    """Change the dataset of a DICOM file."""
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


BITS = "BitsAllocated", "BitsStored", "HighBit"
SMOOTH = np.add.outer(np.arange(24), np.arange(20)).astype(np.uint8)


def test_compressed_slices_are_read_or_name_the_plug_in(tmp_path, write_dicom, here):
    """JPEG 2000 is lossless here; JPEG is 8 bit and lossy; nothing here decodes JPEG-LS."""
    folder = tmp_path / "ct"
    lossless = jpeg(PIXELS.astype(np.uint16), "JPEG2000", no_jp2=True, irreversible=False)
    lossy = jpeg(SMOOTH, "JPEG", quality=100)
    cases = [
        ("j2k", PIXELS, uid.JPEG2000Lossless, lossless, {}),
        ("fewer rows", PIXELS[:12], uid.JPEG2000Lossless, lossless, {}),
        ("jpeg", SMOOTH, uid.JPEGBaseline8Bit, lossy, dict(zip(BITS, (8, 8, 7), strict=True))),
        ("left", PIXELS, uid.JPEG2000Lossless, lossless, {"BitsStored": 12}),
        ("jls1", PIXELS, uid.JPEGLSLossless, b"\xff\xd8\xff\xf7\0\0", {}),
        ("jls2", PIXELS, uid.JPEGLSLossless, b"\xff\xd8\xff\xf7\0\0", {}),
    ]
    for i, (name, pixels, syntax, data, tags) in enumerate(cases):
        write_dicom(folder / name, pixels, SeriesInstanceUID=f"1.{i}", **tags)
        dataset = pydicom.dcmread(folder / name)
        dataset.PixelData = encapsulate([data])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(folder / name)
    slices, reasons, _ = outcome(folder)
    assert (slices["j2k"] == ct.scale_to_uint8(PIXELS)).all()
    assert np.abs(slices["jpeg"].astype(int) - ct.scale_to_uint8(SMOOTH)).max() <= 8
    assert reasons.keys() == {"fewer rows", "jls1", "jls2", "left"}
    assert "HighBit 15: ambiguous in compressed pixels" in reasons["left"]
    assert "cannot be decoded" in reasons["fewer rows"]
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in reasons["jls1"]
    shown = here("reduce.py", folder, tmp_path / "out", "--strategy", "hash")
    assert shown.count("pip install") == 1 and "2 skipped: JPEG-LS" in shown


def in_32_bits(dataset):
    dataset.PixelData = (SMOOTH * np.uint32(2000)).tobytes()  # also above 16 bits
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 32, 32, 31


def test_slices_that_are_unusual_but_fine(tmp_path, write_dicom):
    deflated = ("TransferSyntaxUID", uid.DeflatedExplicitVRLittleEndian)
    changes = {
        "deflated": lambda dataset: setattr(dataset.file_meta, *deflated),
        "run lengths": lambda dataset: dataset.compress(uid.RLELossless),
        "no photometric": lambda dataset: dataset.pop("PhotometricInterpretation"),
        "no high bit": lambda dataset: [dataset.pop("HighBit"), setattr(dataset, "BitsStored", 12)],
        "32 bits": in_32_bits,
        "small letters": lambda dataset: setattr(dataset, "Modality", "ct "),
        "trailing": lambda dataset: setattr(dataset, "DataSetTrailingPadding", b"\0" * 1000),
    }
    for i, (name, change) in enumerate(changes.items()):
        write_dicom(tmp_path / name, SMOOTH.astype(int), SeriesInstanceUID=f"1.{i}")
        edit(tmp_path / name, change)
    (tmp_path / "cut").write_bytes((tmp_path / "run lengths").read_bytes()[:-100])
    slices, reasons, _ = outcome(tmp_path)
    assert slices.keys() == changes.keys() and "cut short" in reasons["cut"]
    assert all((slice8 == ct.scale_to_uint8(SMOOTH)).all() for slice8 in slices.values())


def test_the_odd_ones_of_a_series_are_left_out(tmp_path, write_dicom):
    for i in range(5):
        place = {"ImagePositionPatient": [0, 0, 2.5 * i], "InstanceNumber": 5 - i}
        write_dicom(tmp_path / f"{i}.dcm", PIXELS + i, **place)
    write_dicom(tmp_path / "+scout.dcm", PIXELS, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    write_dicom(tmp_path / "+small.dcm", PIXELS[:8, :8], ImagePositionPatient=[0, 0, 1])
    write_dicom(tmp_path / "again/2.dcm", PIXELS, ImagePositionPatient=[0, 0, 5], InstanceNumber=99)
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "1.dcm").read_bytes())
    slices, reasons, warnings = outcome(tmp_path)
    assert list(slices) == [*(f"{i}.dcm" for i in range(5)), "again/2.dcm"]
    assert warnings == [
        "in DATA: 2 scans of one place, told apart by the order of InstanceNumber, acquisition "
        "and name alone: a guess, look"
    ]
    assert reasons == {
        "+scout.dcm": "orientation unlike 7 slices of its series",
        "+small.dcm": "8 x 8 pixels, unlike 6 slices of its series",
        "copy.dcm": "same SOPInstanceUID and place as another: 1.dcm",
    }


@pytest.mark.parametrize(
    "where, harm, message",
    [
        ([3], {"ImagePositionPatient": None}, "1 of 6 positions missing: ordered by Inst"),
        ([3], {"ImageOrientationPatient": None}, "1 of 6 positions missing: ordered by Inst"),
        (range(6), {"ImagePositionPatient": [0, 0, 7]}, "all positions are the same: ordered by"),
        (range(6), {"ImageOrientationPatient": [1, 0, 0, 0.2, 1, 0]}, "6 of 6 positions missing"),
        (range(6), {"ImageOrientationPatient": [0] * 6}, "6 of 6 positions missing"),
        ([2], {"SeriesInstanceUID": "1.2.9"}, "gaps along z: 1, the widest 5.0 mm where 2.5 mm"),
        ([2], {"InstanceNumber": 99}, "InstanceNumber rises and falls along z"),
    ],
)
def test_broken_geometry_is_warned_of(tmp_path, write_dicom, where, harm, message):
    for i in range(6):
        geometry = {"ImagePositionPatient": [0, 0, 2.5 * i], "InstanceNumber": i}
        write_dicom(tmp_path / f"{5 - i}.dcm", PIXELS, **geometry | (harm if i in where else {}))
    slices, reasons, warnings = outcome(tmp_path)
    assert not reasons and message in " ".join(warnings)
    if "SeriesInstanceUID" not in harm:
        assert list(slices) == [f"{5 - i}.dcm" for i in range(6)]


def test_pictures_give_their_grey_values(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = np.stack([grey, grey[::-1], grey.T], 2)
    luma = np.rint(colour @ [0.299, 0.587, 0.114])
    palette = Image.fromarray(grey)
    palette.putpalette([255 - i // 3 for i in range(768)])  # index i is the grey 255 - i
    clear = palette.copy()
    clear.info["transparency"] = 0  # this index, which is white
    pictures = {
        "palette": (palette, 255 - grey),
        "clear": (clear, ct.scale_to_uint8(np.where(grey, 255 - grey, 0))),
        "la": (np.dstack([grey, grey.T]), grey),
        "rgb": (colour, ct.scale_to_uint8(luma)),
        "rgba": (np.dstack([colour, grey]), ct.scale_to_uint8(np.where(grey, luma, 0))),
        "bits": (grey > 100, (grey > 100) * 255),
        "deep": (np.array([[0, 300], [600, 60000]], np.uint16), [[0, 1], [3, 255]]),
    }
    for name, (pixels, _) in pictures.items():
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(tmp_path / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees to the right
    Image.fromarray(np.rot90(grey)).save(tmp_path / "exif.png", exif=turned)
    pictures["exif"] = grey, grey
    Image.fromarray(grey).save(tmp_path / "capitals.PNG")
    wide = np.array([[0, 1000, 100_000]], np.int32)
    Image.fromarray(wide).save(tmp_path / "wide.png", "TIFF")
    pictures["wide"] = wide, [[0, 3, 255]]
    for kind, channels in ((2, 3), (4, 2), (6, 4)):  # colour, grey and alpha, colour and alpha
        (tmp_path / f"deep{kind}.png").write_bytes(png(1, 1, 16, kind, bytes(1 + 2 * channels)))
    slices, reasons, _ = outcome(tmp_path)
    assert reasons.keys() == {"deep2.png", "deep4.png", "deep6.png"}
    assert all("16 bits of colour or with alpha" in reason for reason in reasons.values())
    assert (slices["capitals.PNG"] == grey).all()
    for name, (_, expected) in pictures.items():
        difference = np.abs(slices[f"{name}.png"] - np.array(expected, int))
        assert difference.max() <= (name in ("rgb", "rgba")), name


def png(width, height, depth, kind, rows):
    """The bytes of a PNG; rows: bytes, each row after a 0."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, kind, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += len(part).to_bytes(4, "big") + name + part
        data += zlib.crc32(name + part).to_bytes(4, "big")
    return data


def test_bombs_and_broken_pictures_are_skipped(tmp_path):
    picture = jpeg(PIXELS.astype(np.uint8), "JPEG")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 0, b"\0" * 9))
    (tmp_path / "cut.jpeg").write_bytes(picture[:-200])
    (tmp_path / "head.jpg").write_bytes(picture[:20])
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.png", "TIFF")
    slices, reasons, _ = outcome(tmp_path)
    assert not slices and "exceeds limit" in reasons["bomb.png"]
    assert "not finite" in reasons["nan.png"]
    assert "cannot be decoded" in reasons["cut.jpeg"]
    assert "not a DICOM file" not in reasons["head.jpg"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sizes_from_1_to_4096_and_constant_slices(tmp_path, write_dicom, here):
    """One-slice series each, but for two constant slices, which are alike by every measure."""
    for i, side in enumerate([1, 2, 16, 4096]):
        ramp = np.add.outer(np.arange(side), np.arange(side)) % 4000
        write_dicom(tmp_path / "ct" / f"{side}", ramp, SeriesInstanceUID=f"1.2.{i}")
    for z in (0, 1):
        tags = {"SeriesInstanceUID": "1.3", "ImagePositionPatient": [0, 0, z]}
        write_dicom(tmp_path / "ct" / f"flat{z}", np.full((16, 16), 7), **tags)
    for strategy in ("hash", "ssim", "mi"):
        out = tmp_path / strategy
        here("reduce.py", tmp_path / "ct", out, "--strategy", strategy, "--name", "a")
        assert [line["kept"] for line in read_lines(out / "a.csv")][-2:] == ["1", "0"]
    slices = np.load(out / "slices.npy")
    assert slices.shape == (6, 224, 224) and (slices[-2:] == 0).all()


def test_masks_beside_ct_are_warned_of(tmp_path, write_dicom, here):
    write_dicom(tmp_path / "ct/a.dcm", PIXELS)
    for name, values in {"mask": [0, 1], "labels": [0, 1, 2, 5], "ct": range(5)}.items():
        pixels = np.resize(np.array(values, np.uint8), (16, 16))
        (tmp_path / "ct" / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / "ct" / name / "1.png")
    here("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "all")
    warnings = read_json(tmp_path / "out/store.json")["warnings"]
    assert [volume for volume, text in warnings if "a mask" in text] == ["labels", "mask"]


def test_a_dirty_tree_is_listed_file_by_file(tmp_path, write_dicom, run):
    """Odd names, links in a circle, and patient data that must stay out of every output."""
    data, out = tmp_path / "ct", tmp_path / "out"
    secret = {"PatientName": "Geheim^Person", "PatientBirthDate": "19010203"}
    names = ["quote\"'", "new\nline", "carriage\rreturn", "comma,name", "-flag"]
    names += ["umläut with space", os.fsdecode(b"latin\xe4")]
    for i, name in enumerate(names):
        place = {"ImagePositionPatient": [0, 0, i]}
        write_dicom(data / f"{name} dir" / name, PIXELS + 100 * i, **secret, **place)
    write_dicom(data / "bad", PIXELS, **secret, RescaleSlope=None)
    complete = (data / "bad").read_bytes()
    for i in range(200, len(complete), 60):
        (data / f"cut {i}").write_bytes(complete[:i])
    (data / "circle").symlink_to(".", target_is_directory=True)
    (data / "knot").symlink_to("knot")
    done = run("reduce.py", data, out, "--strategy", "hash")
    told = [file.read_text(errors="surrogateescape") for file in out.glob("*.[cj]s*")]
    for text in (*told, done.stdout, done.stderr):
        assert "Geheim" not in text and "19010203" not in text
    used = [line["file"] for line in read_lines(out / "slices.csv")]
    skipped = [line["file"] for line in read_lines(out / "skipped.csv")]
    assert sorted(used) == sorted(f"{name} dir/{name}" for name in names)
    assert sorted(used + skipped) == [file for file, _, _ in volumes.list_files(data)]


def test_all_files_that_pydicom_ships(tmp_path, here):
    """Over 200, many broken on purpose: the 12 single-frame CT slices with a rescale are used."""
    folder = Path(pydicom.__file__).parent / "data"
    here("reduce.py", folder, tmp_path, "--strategy", "hash")
    used = {line["file"] for line in read_lines(tmp_path / "slices.csv")}
    skipped = {line["file"] for line in read_lines(tmp_path / "skipped.csv")}
    files = [file for file, _, _ in volumes.list_files(folder)]
    assert len(files) > 200 and sorted(used | skipped) == files and not used & skipped
    for file in files:
        with suppress(Exception):
            dataset = pydicom.dcmread(folder / file)
            slice_in_hu = "LOCALIZER" not in dataset.ImageType and "RescaleSlope" in dataset
            assert (file in used) == (dataset.Modality == "CT" and slice_in_hu)
    assert len(used) == 12


def test_damaged_slices_are_used_or_listed(tmp_path, run):
    """tests/fuzz.py does this with thousands of them."""
    toy.write_cohort(tmp_path, patients=2, slices=3)
    assert "30 mutants: " in run("tests/fuzz.py", tmp_path, "--mutants", 30).stdout
