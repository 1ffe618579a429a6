"""Colours of heat maps, and heat maps as images of a pixel a cell.

The map is viridis: even steps of a value look like even steps, also to the colour-blind and in grey.
"""

import base64
import struct
import zlib

import numpy as np


# Points of viridis (Matplotlib, CC0) at even distances; between them colours are mixed.
_VIRIDIS = (
    *("#440154", "#481a6c", "#472f7d", "#414487", "#39568c", "#31688e", "#2a788e", "#23888e", "#1f988b", "#22a884"),
    *("#35b779", "#54c568", "#7ad151", "#a5db36", "#d2e21b", "#fde725"),
)
# Of an image: as many as an eye tells apart, and a quarter smaller than all that a byte has.
_NUM_LEVELS = 63


def color_at(share: float) -> str:
    """Return the colour of a value at `share` of its scale, 0 to 1."""
    return "#" + bytes(_rgb(share)).hex()


def is_light(share: float) -> bool:
    """Return whether text on the colour at `share` should be dark."""
    red, green, blue = _rgb(share)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def gradient() -> str:
    """Return the colours as a CSS gradient from low to high."""
    return f"linear-gradient(to right, {', '.join(_VIRIDIS)})"


def heat_image(shares: np.ndarray) -> str:
    """Return `shares` of the scale [rows, columns] as the data URI of a PNG, a pixel a cell; NaN is transparent."""
    levels = np.where(np.isnan(shares), 0, 1 + np.round(np.clip(np.nan_to_num(shares), 0, 1) * (_NUM_LEVELS - 1)))
    # A row starts with its filter, 0 for none.
    rows = np.pad(levels.astype(np.uint8), ((0, 0), (1, 0)))
    palette = bytes(3) + b"".join(bytes(_rgb(level / (_NUM_LEVELS - 1))) for level in range(_NUM_LEVELS))
    num_rows, num_columns = shares.shape
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", num_columns, num_rows, 8, 3, 0, 0, 0)),  # 8 bits, which a palette explains
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _rgb(share: float) -> tuple[int, int, int]:
    position = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    first = min(int(position), len(_VIRIDIS) - 2)
    low, high = (bytes.fromhex(_VIRIDIS[index][1:]) for index in (first, first + 1))
    red, green, blue = (round(a + (b - a) * (position - first)) for a, b in zip(low, high, strict=True))
    return red, green, blue
