"""A contact sheet of a selection: what was kept, and how much each kept slice stands for."""

from os.path import dirname

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.store import read_lines

TILE, COLUMNS, MAX_VOLUMES = 112, 10, 8  # pixels a slice, slices a volume, volumes a sheet
TITLE, LABEL, GAP = 22, 16, 14  # heights in pixels


def contact_sheet(name, store, representative):
    """Pillow image: of up to 8 volumes, up to 10 kept slices, and what each stands for."""
    files = [line["file"] for line in read_lines(store.path.with_suffix(".csv"))]
    volumes = spread_over(np.arange(len(store.volumes)), MAX_VOLUMES)
    height = TITLE + TILE + LABEL + GAP
    sides = GAP + COLUMNS * TILE + GAP, TITLE + GAP + len(volumes) * height
    sheet = Image.new("RGB", sides, "black")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(13)
    kept = f"{len(np.unique(representative))} of {len(representative)} slices kept"
    shown = f"{len(volumes)} of {len(store.volumes)} volumes shown"
    draw.text((GAP, GAP // 2), f"{name}: {kept}, {shown};  xN: stands for N slices", "white")
    for i, volume in enumerate(volumes):
        place, slices = store.names[volume], store.volumes[volume]
        file = files[slices[0]]
        if not file.startswith(place):  # of DICOM: it is a UID
            place = dirname(file) or file
        top = TITLE + GAP + i * height
        place = place.encode(errors="replace").decode()  # of a name that is not UTF-8
        draw_volume(sheet, draw, top, place, store.slices, slices, representative)
    return sheet


def draw_volume(sheet, draw, top, place, pixels, slices, representative):
    """A line of text, and a row of kept slices with their labels, from `top` down."""
    kept = slices[representative[slices] == slices]
    shown = spread_over(kept, COLUMNS)
    heading = f"{place[-100:]}: {len(kept)} of {len(slices)} slices kept"
    if len(shown) < len(kept):
        heading += f", {len(shown)} of {len(kept)} shown"
    draw.text((GAP, top), heading, "white")
    side = TILE - 2
    for column, index in enumerate(shown):
        left = GAP + column * TILE
        tile = Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BILINEAR)
        sheet.paste(tile, (left, top + TITLE))
        label = f"slice {index - slices[0]}  x{np.count_nonzero(representative == index)}"
        draw.text((left, top + TITLE + side + 1), label, "khaki")


def spread_over(items, count):
    """Up to `count` of the items, at even distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return items[places.round().astype(int)]
