"""A contact sheet of a selection: what was kept, how much each kept slice stands for, and where along z."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, COLUMNS, MAX_VOLUMES = 112, 10, 8  # pixels a slice, slices a volume, volumes a sheet
TITLE, LABEL, STRIP, GAP = 22, 16, 12, 14  # heights in pixels


def contact_sheet(name, store, representative):
    """Pillow image: for up to 8 volumes, up to 10 kept slices in z order, each with the number it stands for (x12),
    over a strip along z, bright where a slice was kept and dark where it was dropped."""
    picked = np.unique(np.linspace(0, len(store.volumes) - 1, MAX_VOLUMES).round().astype(int))
    height = TITLE + TILE + LABEL + STRIP + GAP
    sheet = Image.new(
        "RGB", (GAP + COLUMNS * TILE + GAP, TITLE + GAP + len(picked) * height), "black"
    )
    draw = ImageDraw.Draw(sheet)
    n = len(representative)
    kept = int((representative == np.arange(n)).sum())
    head = f"{name}: {kept} of {n} slices kept in {len(store.volumes)} volumes; xN: a kept slice stands for N; strip: z, bright = kept"
    write(draw, (GAP, GAP // 2), head, "white")
    for i, volume in enumerate(picked):
        draw_volume(sheet, draw, TITLE + GAP + i * height, store, volume, representative)
    return sheet


def draw_volume(sheet, draw, top, store, volume, representative):
    rows = store.volumes[volume]
    kept = rows[representative[rows] == rows]
    write(
        draw,
        (GAP, top),
        f"...{store.names[volume][-32:]}: {len(kept)} of {len(rows)} slices kept",
        "white",
    )
    shown = (
        kept[np.unique(np.linspace(0, len(kept) - 1, min(COLUMNS, len(kept))).round().astype(int))]
        if len(kept)
        else kept
    )
    top += TITLE
    for column, row in enumerate(shown):
        left = GAP + column * TILE
        sheet.paste(
            Image.fromarray(store.slices[row]).resize(
                (TILE - 2, TILE - 2), Image.Resampling.BILINEAR
            ),
            (left, top),
        )
        write(
            draw,
            (left, top + TILE - 1),
            f"z {np.searchsorted(rows, row)}  x{(representative == row).sum()}",
            "khaki",
        )
    top += TILE + LABEL
    width = COLUMNS * TILE
    draw.rectangle((GAP, top, GAP + width - 1, top + STRIP - 1), fill=(70, 70, 70))
    for row in kept:
        left = GAP + np.searchsorted(rows, row) * width // len(rows)
        draw.rectangle(
            (left, top, left + max(1, width // len(rows) - 1), top + STRIP - 1), fill="gold"
        )


def write(draw, place, text, colour):
    draw.text(place, text, fill=colour, font=font())


@lru_cache
def font():
    return ImageFont.load_default(13)
