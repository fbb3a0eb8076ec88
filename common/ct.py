"""One CT slice as an 8-bit picture: DICOM, PNG or JPEG to grey values, HU, 0..255.

Knows nothing of volumes or strategies.
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.dicom import (
    MAX_PIXELS,
    Unusable,
    check_is_file,
    no_larger_than,
    read_header,
    read_stored,
    reason,
)

AIR_HU = -1000.0  # what padding outside the field of view becomes, see stored_to_hu
PAINTED_PADDING = -2000  # the scanner's fill value outside the field of view (official code)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


def read_slice(path, window=None, header=None):
    """Read a DICOM, PNG or JPEG file as an 8-bit grey slice, uint8 [height, width].

    window: see scale_to_uint8. header: read_header's, where it is at hand.
    Raises Unusable with a reason.
    """
    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            if window is not None:
                raise Unusable("--window needs HU, which a PNG or JPEG does not hold")
            return scale_to_uint8(read_image(path))
        header = header or read_header(path)
        if isinstance(header, str):
            raise Unusable(header)
        return stored_to_uint8(read_stored(path, header), header, window)
    except Exception as error:  # whatever a damaged file raises
        message = " ".join(str(error).split())
        raise Unusable(reason(error) or f"pixels cannot be decoded: {message}") from error


def read_image(path):
    """A PNG or JPEG file -> grey values, [height, width]; raises Unusable with a reason.

    16-bit grey keeps its 16 bits, colour and palettes become luma, transparency is ignored.
    """
    check_is_file(path)
    try:
        with no_larger_than(MAX_PIXELS), Image.open(path) as image:
            grey = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
            return np.asarray(image if grey else image.convert("L"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable("larger than a slice may be: at most 8192 x 8192 pixels") from None
    except UnidentifiedImageError:
        raise Unusable("not a PNG or JPEG, though named like one") from None


def stored_to_uint8(stored, header, window=None):
    """The 8-bit slice of stored values: scale_to_uint8(stored_to_hu(stored, header), window).

    Both depend on a stored value alone, so they are computed once for each value, and a table
    gives each pixel its grey value: in a tenth of the time.
    """
    if stored.dtype not in (np.int16, np.uint16):
        return scale_to_uint8(stored_to_hu(stored, header), window)
    index = stored.view(np.uint16)  # negative values lie behind the others
    values = np.arange(int(stored.min()), int(stored.max()) + 1)
    if is_padding(values, header).any():
        # padding becomes air, perhaps the lowest HU of all, so only values that occur may count
        occurring = np.flatnonzero(np.bincount(index.ravel())).astype(np.uint16)
        values = occurring.view(stored.dtype).astype(int)
    table = np.zeros(2**16, np.uint8)
    table[values.astype(np.uint16)] = scale_to_uint8(stored_to_hu(values, header), window)
    return table.take(index, mode="clip")  # all are inside; without a check it is faster


def stored_to_hu(stored, header):
    """Stored values of a DICOM slice, integers of any shape, and its Header -> HU, float64.

    Padding outside the field of view (PixelPaddingValue or its range, or stored values <= -2000)
    counts as air. The official code sets -2000 to a stored 0, which is air at the usual
    intercepts of -1000 and -1024; at other intercepts (GE head scans store HU with an intercept
    of 0) a stored 0 would be water, so it is -1000 HU there.
    """
    hu = stored * header.slope + header.intercept
    hu[is_padding(stored, header)] = min(header.intercept, AIR_HU)
    return hu


def is_padding(stored, header):
    """Bool mask: which stored values lie outside the field of view."""
    padding = stored <= PAINTED_PADDING
    if header.padding:
        padding |= (stored >= header.padding[0]) & (stored <= header.padding[1])
    return padding


def scale_to_uint8(values, window=None):
    """Values of any shape -> uint8, from their minimum to their maximum, rounded.

    Paper: min-max of each slice, no window. window: (center, width) in HU clips to that window
    instead, the usual CT display, as an ablation. A constant slice becomes 0. Raises Unusable for
    values that are not finite.
    """
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():  # a NaN anywhere makes both NaN
        raise Unusable("holds values that are not finite")
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        values = np.clip(values, low, high)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)
