"""One CT slice as an 8-bit picture: DICOM, PNG or JPEG to grey values, HU, 0..255."""

import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.dicom import Unusable, check_is_file, read_header, read_stored, reason, refuse_if

AIR_HU = -1024.0, -1000.0  # what padding outside the field of view becomes lies between these
PAINTED_PADDING = -2000  # the scanner's fill value outside the field of view (official code)


def read_slice(path, window=None, header=None):
    """Read a DICOM, PNG or JPEG file as an 8-bit grey slice, uint8 [height, width].

    window: see scale_to_uint8. header: read_header's, where it is at hand.
    Raises Unusable with a reason.
    """
    try:
        if is_image(path):
            refuse_if(window is not None, "--window needs HU, which a PNG or JPEG does not hold")
            return scale_to_uint8(read_image(path))
        header = header or read_header(path)
        refuse_if(isinstance(header, str), header)
        return stored_to_uint8(read_stored(path, header), header, window)
    except Exception as error:  # whatever a damaged file raises
        message = re.sub(" at 0x[0-9a-f]+", "", " ".join(str(error).split()))  # no two runs alike
        raise Unusable(reason(error) or f"pixels cannot be decoded: {message}") from error


def is_image(path):
    return str(path).lower().endswith((".png", ".jpg", ".jpeg"))


def read_image(path):
    """A PNG or JPEG file -> grey values, [height, width]; raises what Pillow does.

    16-bit grey keeps its 16 bits, colour and palettes become luma, what is fully transparent
    becomes 0, and EXIF orientation is heeded.
    """
    check_is_file(path)
    try:
        with Image.open(path) as image:
            grey = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
            if not grey and ";16" in str(image.tile):
                raise Unusable("16 bits of colour or with alpha, of which 8 are lost: save as grey")
            ImageOps.exif_transpose(image, in_place=True)
            if grey or not image.has_transparency_data:
                return np.asarray(image if grey else image.convert("L"))
            return np.where(image.convert("RGBA").getchannel("A"), image.convert("L"), np.uint8(0))
    except UnidentifiedImageError:
        raise Unusable("no picture, such as a PNG or JPEG, that Pillow can read") from None


def stored_to_uint8(stored, header, window=None):
    """scale_to_uint8(stored_to_hu(stored, header), window), in a quarter of the time.

    Without padding, the lowest stored value is also the lowest in HU: a table of all between the
    lowest and the highest is enough, and less to do than one of the values that occur.
    """
    if stored.dtype.itemsize != 2:
        return scale_to_uint8(stored_to_hu(stored, header), window)
    words = stored.view(np.uint16)  # negative values lie behind the others
    values = np.arange(int(stored.min()), int(stored.max()) + 1)
    if is_padding(values, header).any():
        occurs = np.zeros(2**16, bool)
        occurs[words] = True
        values = np.flatnonzero(occurs).astype(np.uint16).view(stored.dtype)
    table = np.zeros(2**16, np.uint8)
    table[values.astype(np.uint16)] = scale_to_uint8(stored_to_hu(values, header), window)
    return table.take(words, mode="clip")  # faster without a check


def stored_to_hu(stored, header):
    """Stored values of a DICOM slice, integers of any shape, and its Header -> HU, float64.

    Padding counts as air. The official code sets -2000 to a stored 0, which is air at the usual
    intercepts of -1000 and -1024, but water in HU (GE head scans), and nothing at -8192 (Siemens).
    """
    hu = stored * header.slope + header.intercept
    hu[is_padding(stored, header)] = min(max(header.intercept, AIR_HU[0]), AIR_HU[1])
    return hu


def is_padding(stored, header):
    """Bool mask: which stored values lie outside the field of view."""
    fill = PAINTED_PADDING / header.slope
    if header.intercept < AIR_HU[0]:  # no air is stored as 0, and the fill may be one of HU
        fill = max(0, (PAINTED_PADDING - header.intercept) / header.slope)
    padding = stored <= fill
    if header.padding:
        padding |= (stored >= header.padding[0]) & (stored <= header.padding[1])
    return padding


def scale_to_uint8(values, window=None):
    """Values of any shape -> uint8, from their minimum to their maximum, rounded (paper).

    window: (center, width) in HU: from its lower to its upper end instead, as an ablation. A
    constant slice becomes 0. Raises Unusable for values that are not finite.
    """
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    # a NaN anywhere makes both NaN
    refuse_if(not np.isfinite([low, high]).all(), "holds values that are not finite")
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        values = np.clip(values, low, high)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)
