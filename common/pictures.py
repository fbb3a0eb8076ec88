"""A contact sheet of a selection: what was kept, how much each kept slice stands for, and where."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, COLUMNS, MAX_VOLUMES = 112, 10, 8  # pixels a slice, slices a volume, volumes a sheet
TITLE, LABEL, STRIP, GAP = 22, 16, 12, 14  # heights in pixels
WIDTH = COLUMNS * TILE


def contact_sheet(name, store, representative):
    """Pillow image: for up to 8 volumes, up to 10 kept slices in z order, each with the number it
    stands for (x12), over a strip along z, bright where a slice was kept."""
    volumes = spread_over(np.arange(len(store.volumes)), MAX_VOLUMES)
    height = TITLE + TILE + LABEL + STRIP + GAP
    sheet = Image.new("RGB", (GAP + WIDTH + GAP, TITLE + GAP + len(volumes) * height), "black")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(13)
    n = len(representative)
    kept = (representative == np.arange(n)).sum()
    heading = (
        f"{name}: {kept} of {n} slices kept in {len(store.volumes)} volumes; "
        "xN: a kept slice stands for N; strip: z, bright = kept"
    )
    draw.text((GAP, GAP // 2), heading, "white")
    for i, volume in enumerate(volumes):
        draw_volume(sheet, draw, TITLE + GAP + i * height, store, volume, representative)
    return sheet


def draw_volume(sheet, draw, top, store, volume, representative):
    """A line of text, a row of slices with their labels, and the strip, from `top` down."""
    rows = store.volumes[volume]
    kept = rows[representative[rows] == rows]
    heading = f"...{store.names[volume][-32:]}: {len(kept)} of {len(rows)} slices kept"
    draw.text((GAP, top), heading, "white")

    tiles_top = top + TITLE
    for column, row in enumerate(spread_over(kept, COLUMNS)):
        left = GAP + column * TILE
        tile = Image.fromarray(store.slices[row])
        tile = tile.resize((TILE - 2, TILE - 2), Image.Resampling.BILINEAR)
        sheet.paste(tile, (left, tiles_top))
        label = f"slice {row - rows[0]}  x{(representative == row).sum()}"
        draw.text((left, tiles_top + TILE - 1), label, "khaki")

    strip_top = tiles_top + TILE + LABEL
    strip_bottom = strip_top + STRIP - 1
    draw.rectangle((GAP, strip_top, GAP + WIDTH - 1, strip_bottom), fill=(70, 70, 70))
    for row in kept:
        left = GAP + (row - rows[0]) * WIDTH // len(rows)
        right = left + max(1, WIDTH // len(rows) - 1)
        draw.rectangle((left, strip_top, right, strip_bottom), fill="gold")


def spread_over(items, count):
    """Up to `count` of the items, at even distances, the first and the last among them."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).round().astype(int)]
