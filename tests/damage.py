"""One file of each mode and of each kind of damage, made on the spot."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

COLOUR = (200, 100, 50)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height=48, width=64):
    """Return an image with something different everywhere."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 127 + 100 * np.sin((rows + columns) / 5)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def modes():
    """Return the file of each mode, and the colour that all of it has."""
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    plain = Image.new("RGB", (12, 10), COLOUR)
    deep = np.full((10, 12), 200 * 257, dtype=np.uint16)
    files = {f"rgb.{kind.lower()}": saved(plain, kind) for kind in ("PNG", "BMP", "TIFF", "PPM")}
    colours = dict.fromkeys(files, COLOUR)
    more = {
        "rgb.jpg": (saved(plain, "JPEG", quality=95), COLOUR),
        "rgb.webp": (saved(plain, "WEBP", lossless=True), COLOUR),
        "palette.gif": (saved(plain, "GIF"), COLOUR),
        "palette.png": (saved(plain.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), COLOUR),
        "frames.gif": (saved(plain, "GIF", save_all=True, append_images=[Image.new("RGB", (12, 10))]), COLOUR),
        "pages.tiff": (saved(plain, "TIFF", save_all=True, append_images=[Image.new("RGB", (12, 10))]), COLOUR),
        "grey.png": (saved(plain.convert("L"), "PNG"), (grey,) * 3),
        "grey.jpg": (saved(plain.convert("L"), "JPEG", quality=95), (grey,) * 3),
        "grey and alpha.png": (saved(plain.convert("LA"), "PNG"), (grey,) * 3),
        "alpha.png": (saved(Image.new("RGBA", (12, 10), (*COLOUR, 7)), "PNG"), COLOUR),
        "alpha.webp": (saved(Image.new("RGBA", (12, 10), (*COLOUR, 255)), "WEBP", lossless=True), COLOUR),
        "black and white.png": (saved(Image.new("1", (12, 10), 1), "PNG"), (255,) * 3),
        "cmyk.jpg": (saved(Image.new("CMYK", (12, 10), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        "cmyk.tiff": (saved(Image.new("CMYK", (12, 10), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "ycbcr.tiff": (saved(plain.convert("YCbCr"), "TIFF"), COLOUR),
        "16 bits.png": (saved(Image.fromarray(deep), "PNG"), (200,) * 3),
        "16 bits.tiff": (saved(Image.fromarray(deep), "TIFF"), (200,) * 3),
        "16 bits.pgm": (b"P5 12 10 65535\n" + deep.astype(">u2").tobytes(), (200,) * 3),
        "fractions.tiff": (saved(Image.fromarray(np.full((10, 12), 0.4, dtype=np.float32)), "TIFF"), (102,) * 3),
        "floats.tiff": (saved(Image.fromarray(np.full((10, 12), 200.0, dtype=np.float32)), "TIFF"), (200,) * 3),
        "png called.jpg": (saved(plain, "PNG"), COLOUR),
    }
    return {name: (files[name], colours[name]) for name in files} | more


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width=60_000, height=60_000):
    """Return a small PNG that says it is huge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def damages():
    """Return the file of each kind of damage, and what the reason says."""
    whole = {kind: saved(gradient(), kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")}
    flipped = bytearray(whole["PNG"])
    flipped[len(flipped) // 2] ^= 255
    cut = {
        f"cut off.{kind.lower()}": (data[: len(data) * 2 // 3], r"^is (truncated|broken)")
        for kind, data in whole.items()
    }
    return cut | {
        "empty.jpg": (b"", "^is empty$"),
        "text.jpg": (b"this is no image", "^is no image of a format that is read$"),
        "archive.png": (b"PK\x03\x04" + bytes(100), "^is no image of a format that is read$"),
        "header alone.png": (whole["PNG"][:8], "^is (no image|broken|truncated)"),
        "flipped.png": (bytes(flipped), "^is (broken|truncated)"),
        "bomb.png": (bomb(), r"^has (3,600,000,000|more than 89,478,485) pixels"),
        "large.png": (bomb(10_000, 10_000), r"pixels"),
        "postscript.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "^is no image of a format that is read$",
        ),
    }
