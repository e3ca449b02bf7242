"""Pictures made wrong: sizes that nobody can hold, bombs, and headers that lie."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Mapping
from random import Random

from corruption import Corruption
from PIL import Image

_SIDES = (0, 1, 65_535, 100_000, 2**24, 2**31 - 1, 2**32 - 1)
_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "I", "F", "CMYK")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@functools.cache
def png(width: int, height: int, *, color_type: int = 2, depth: int = 8, rows: int | None = None,
        more: bytes = b"") -> bytes:  # fmt: skip
    """A PNG that declares this size and holds ``rows`` rows of zeros (None: all of them).

    ``more`` are chunks in front of the pixels.
    """
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    row = bytes(1 + (width * channels * depth + 7) // 8) if rows != 0 else b""
    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(row) for _ in range(height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if color_type == 3 else b""
    pixels = chunk(b"IDAT", data + squeeze.flush())
    return _SIGNATURE + chunk(b"IHDR", header) + palette + more + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def declared_size(data: bytes, random: Random) -> bytes:
    """Another width and height in the header, all else as it was."""
    width, height = random.choice(_SIDES), random.choice(_SIDES)
    if data.startswith(_SIGNATURE):
        header = struct.pack(">II", width, height) + data[24:29]
        return data[:8] + chunk(b"IHDR", header) + data[33:]
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data, width & 0xFFFF, height & 0xFFFF)
    if data[:1] == b"P":
        rest = data.split(b"\n", 3)[-1]
        digits = random.choice((b"%d %d" % (width, height), b"9" * 5000 + b" 1", b"-4 4", b"4"))
        return b"\n".join((data[:2], digits, b"255", rest))
    at = random.randrange(min(64, len(data)))
    return data[:at] + struct.pack("<I", width) + data[at + 4 :]


def _jpeg_size(data: bytes, width: int, height: int) -> bytes:
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    return data


def bomb(_data: bytes, random: Random) -> bytes:
    """A PNG of some hundred kilobytes that is gigabytes of pixels when it is decoded."""
    width, height = random.choice(
        ((8_000, 8_000), (9_000, 9_900), (13_000, 13_000), (13_377, 13_377), (40_000, 40_000),
         (1, 80_000_000), (89_000_000, 1))
    )  # fmt: skip
    color_type = random.choice((0, 2, 3, 6))
    # The rest of the rows is missing where holding them would only slow down the making.
    rows = None if width * height < 90_000_000 and height < 20_000 else 10
    return png(width, height, color_type=color_type, rows=rows)


def strange_chunks(_data: bytes, random: Random) -> bytes:
    """Text that is large when unpacked, a broken colour profile, 16 bits a channel."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(random.choice((10**3, 10**8))), 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7), 9))
    animated = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    transparency = chunk(b"tRNS", bytes(random.choice((0, 1, 6, 300))))
    more = random.choice((text, profile, animated, transparency))
    color_type, depth = random.choice(((0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 8), (6, 16)))
    return png(40, 40, color_type=color_type, depth=depth, more=more)


def other_format(data: bytes, random: Random) -> bytes:
    """The same picture as a file of another kind, mode or shape under the old name."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert(random.choice(_MODES))
    width, height = random.choice(((1, 1), (1, 5000), (5000, 1), (2, 3), (40, 40)))
    buffer = io.BytesIO()
    image.resize((width, height)).save(buffer, random.choice(("TIFF", "GIF", "TGA", "DIB", "PCX"))
        if image.mode in ("RGB", "L", "P") else "TIFF")  # fmt: skip
    written = bytearray(buffer.getvalue())
    if random.random() < 0.6:
        for _ in range(random.randint(1, 8)):
            written[random.randrange(min(len(written), 400))] = random.randrange(256)
    return bytes(written)


PICTURES: Mapping[str, Corruption] = {
    "size declared": declared_size,
    "bomb": bomb,
    "strange chunks": strange_chunks,
    "other format": other_format,
}
