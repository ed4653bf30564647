"""Image files as people have them: one of each mode and one of each kind of damage, made on the spot."""

import io
import random
import struct
import zlib

import cv2
import numpy as np
from PIL import Image


def saved(image, kind, **options):
    """Return an image as a file."""
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # Pillow notes the format's options in the image
    return buffer.getvalue()


def damaged(data, seed):
    """Return the bytes of a file with a bit turned, or cut off."""
    rng = random.Random(seed)
    if seed % 2:
        return data[: rng.randrange(len(data))]
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


def gradient(height=48, width=64):
    """Return an image with something different everywhere."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 127 + 100 * np.sin((rows + columns) / 5)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def modes(folder):
    """Write the file of each mode; return by its name where it is, its pixels ``(H, W, 3)``, and how near is enough."""
    return {name: (_written(folder / name, data), *expected) for name, (data, *expected) in MODES.items()}


def damages(folder):
    """Write each kind of damage; return by its name where it is, and a pattern of the reason that is given."""
    found = {name: (_written(folder / name, data), reason) for name, (data, reason) in DAMAGES.items()}
    (folder / "dangling.jpg").symlink_to(folder / "nothing.jpg")
    (folder / "folder.jpg").mkdir()
    return found | {
        "dangling.jpg": (folder / "dangling.jpg", "No such file or directory"),
        "folder.jpg": (folder / "folder.jpg", "Is a directory"),
    }


def _written(path, data):
    path.write_bytes(data)
    return path


def tiff(data, height, width, *, bits, photometric=1, order="<"):
    """Return a TIFF of one strip, for what Pillow does not write."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def _packed(values):
    """Return numbers of 12 bits, two in three bytes."""
    even, odd = values.reshape(-1, 2).T.astype(np.uint16)
    return np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=-1).astype(np.uint8).tobytes()


def _then_black(picture):
    return {"save_all": True, "append_images": [Image.new("RGB", picture.size)]}


def _modes():
    picture = gradient(10, 12)
    pixels = np.asarray(picture)
    level, alpha = pixels[..., 1], np.asarray(picture.rotate(180))[..., 0]
    grey, translucent = np.stack([level] * 3, axis=-1), Image.fromarray(np.dstack([pixels, alpha]))
    stretched = np.stack([np.rint((level - float(level.min())) * 255 / np.ptp(level))] * 3, axis=-1)
    deep, wide = level.astype(np.uint16) * 257, pixels.astype(np.uint16) * 257
    colours = np.array([[10, 20, 30], [200, 100, 0], [7, 8, 9]], dtype=np.uint8)
    index = (level // 86).astype(np.uint8)
    palette = Image.fromarray(index)
    palette.putpalette(colours.ravel().tolist())
    ink = Image.frombytes("CMYK", picture.size, np.dstack([255 - pixels, 0 * alpha]).tobytes())
    lab = Image.frombytes("LAB", picture.size, bytes([138, 81, 70]) * 120)  # red: lightness 54.3, a 80.8, b 69.9
    red = np.broadcast_to([255, 0, 0], pixels.shape)
    best = {"quality": 100, "subsampling": 0}
    real = Image.fromarray(level.astype(np.float32) / 255)
    broken = np.where(level == level[0, 0], np.nan, 3e6 * level).astype(np.float32)
    return {
        **{f"rgb.{kind.lower()}": (saved(picture, kind), pixels, 0) for kind in ("PNG", "BMP", "TIFF", "PPM")},
        "rgb.jpg": (saved(picture, "JPEG", **best), pixels, 4),
        "progressive.jpg": (saved(picture, "JPEG", progressive=True, **best), pixels, 4),
        "several pictures.jpg": (saved(picture, "MPO", **_then_black(picture), **best), pixels, 4),
        "rgb.webp": (saved(picture, "WEBP", lossless=True), pixels, 0),
        "lossy.webp": (saved(picture, "WEBP", quality=100), pixels, 40),  # half the colour of every second pixel
        "lzw.tiff": (saved(picture, "TIFF", compression="tiff_lzw"), pixels, 0),
        "deflate.tiff": (saved(picture, "TIFF", compression="tiff_adobe_deflate"), pixels, 0),
        "jpeg.tiff": (saved(picture, "TIFF", compression="jpeg", quality=100), pixels, 2),
        "frames.png": (saved(picture, "PNG", **_then_black(picture)), pixels, 0),
        "frames.webp": (saved(picture, "WEBP", **_then_black(picture), lossless=True), pixels, 0),
        "pages.tiff": (saved(picture, "TIFF", **_then_black(picture)), pixels, 0),
        "frames.gif": (saved(palette, "GIF", **_then_black(picture)), colours[index], 0),
        "palette.gif": (saved(palette, "GIF"), colours[index], 0),
        "palette.png": (saved(palette, "PNG"), colours[index], 0),
        "palette.bmp": (saved(palette, "BMP"), colours[index], 0),
        "palette.tiff": (saved(palette, "TIFF"), colours[index], 0),
        "one colour transparent.png": (saved(palette, "PNG", transparency=1), colours[index], 0),
        "palette with alpha.png": (saved(palette, "PNG", transparency=bytes([255, 0, 128])), colours[index], 0),
        "one colour transparent.gif": (saved(palette, "GIF", transparency=1), colours[index], 0),
        **{f"grey.{kind.lower()}": (saved(Image.fromarray(level), kind), grey, 0) for kind in ("PNG", "BMP", "TIFF")},
        "grey.pgm": (saved(Image.fromarray(level), "PPM"), grey, 0),
        "grey.jpg": (saved(Image.fromarray(level), "JPEG", quality=100), grey, 2),
        "one grey transparent.png": (saved(Image.fromarray(level), "PNG", transparency=85), grey, 0),
        "grey and alpha.png": (
            saved(Image.merge("LA", [Image.fromarray(level), Image.fromarray(alpha)]), "PNG"),
            grey,
            0,
        ),
        **{f"alpha.{kind.lower()}": (saved(translucent, kind), pixels, 0) for kind in ("PNG", "TIFF")},
        "alpha.webp": (saved(translucent, "WEBP", lossless=True, exact=True), pixels, 0),
        **{
            f"black and white.{kind.lower()}": (saved(Image.fromarray(level > 99), kind), (grey > 99) * 255, 0)
            for kind in ("PNG", "BMP", "TIFF", "PPM")
        },
        "cmyk.jpg": (saved(ink, "JPEG", **best), pixels, 4),  # Adobe's: the inks are stored inverted
        "cmyk.tiff": (saved(ink, "TIFF"), pixels, 0),
        "ycbcr.tiff": (saved(picture.convert("YCbCr"), "TIFF"), pixels, 3),
        "lab.tiff": (saved(lab, "TIFF"), red, 6),
        "12 bits.tiff": (tiff(_packed(level * 4095.0 / 255), 10, 12, bits=12), grey, 1),
        "12 bits.pgm": (b"P5 12 10 4095\n" + np.rint(level * 4095.0 / 255).astype(">u2").tobytes(), grey, 0),
        "16 bits.png": (saved(Image.fromarray(deep), "PNG"), grey, 0),
        "16 bits.tiff": (saved(Image.fromarray(deep), "TIFF"), grey, 0),
        "16 bits big endian.tiff": (tiff(deep.astype(">u2").tobytes(), 10, 12, bits=16, order=">"), grey, 0),
        "16 bits.pgm": (b"P5 12 10 65535\n" + deep.astype(">u2").tobytes(), grey, 0),
        "16 bits plain.pgm": (f"P2 12 10 65535\n{' '.join(map(str, deep.ravel()))}\n".encode(), grey, 0),
        "16 bits rgb.png": (cv2.imencode(".png", wide[..., ::-1])[1].tobytes(), pixels, 0),
        "16 bits rgb.tiff": (cv2.imencode(".tiff", wide[..., ::-1])[1].tobytes(), pixels, 0),
        "16 bits rgb.ppm": (b"P6 12 10 65535\n" + wide.astype(">u2").tobytes(), pixels, 0),
        "32 bits.tiff": (saved(Image.fromarray(deep.astype(np.int32)), "TIFF"), grey, 0),
        "32 bits full.tiff": (saved(Image.fromarray(level.astype(np.int32) * 9_000_000 - 10**9), "TIFF"), stretched, 1),
        "fractions.tiff": (saved(real, "TIFF"), grey, 0),
        "fractions.pfm": (saved(real, "PPM"), grey, 0),
        "floats.tiff": (saved(Image.fromarray(level.astype(np.float32) * 1e6 - 1e8), "TIFF"), stretched, 1),
        "not a number.tiff": (saved(Image.fromarray(broken), "TIFF"), stretched, 1),
        "all the same.tiff": (saved(Image.new("F", picture.size, -5.0), "TIFF"), 0 * pixels, 0),
        "png called.jpg": (saved(picture, "PNG"), pixels, 0),
    }


def png(width, height, *, checksum=0):
    """Return a PNG of nothing that says how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ checksum)
        for kind, data in chunks
    )


def _flipped(data, place):
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def _damages():
    picture = gradient()
    whole = {f"cut off.{kind.lower()}": saved(picture, kind) for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "PPM")}
    late = {
        "cut off.webp": saved(picture, "WEBP"),
        "cut off lzw.tiff": saved(picture, "TIFF", compression="tiff_lzw"),
        "cut off frames.gif": saved(picture, "GIF", save_all=True, append_images=[picture])[:800],
    }
    whole["cut off progressive.jpg"] = saved(picture, "JPEG", progressive=True)
    whole["cut off deep.pgm"] = b"P5 12 10 4095\n" + bytes(240)
    image, photo = whole["cut off.png"], whole["cut off.jpeg"]
    data = image.index(b"IDAT") + 4
    nothing, broken = "^is no image of a format that is read$", "^cannot be decoded: "
    large = r"^has 3,600,000,000 pixels, at most 89,478,485 are decoded$"
    return {
        **{name: (data[: len(data) * 2 // 3], "^is truncated$") for name, data in whole.items()},
        **{name: (data[: len(data) * 2 // 3], "^is truncated( or broken)?$") for name, data in late.items()},
        "no end.png": (image[:-12], "^is truncated$"),
        "header alone.png": (image[:8], "^is truncated$"),
        "header alone.jpg": (photo[:20], "^is truncated"),
        "header alone.tiff": (b"II*\0", "^is truncated"),
        "broken header.png": (_flipped(image, 16), f"{broken}.*IHDR"),
        "broken header.jpg": (_flipped(photo, photo.index(b"\xff\xc0") + 4), broken),
        "broken header.tiff": (_flipped(whole["cut off.tiff"], 5), "^is truncated or broken$"),
        "broken header.bmp": (_flipped(whole["cut off.bmp"], 14), broken),
        "broken data.png": (_flipped(image, data + 40), broken),
        "broken checksum.png": (_flipped(image, image.rindex(b"IEND") - 8), f"{broken}.*checksum"),
        "no pixels.ppm": (b"P6 0 0 255\n", "^is truncated or broken$"),
        "empty.jpg": (b"", "^is empty$"),
        "text.jpg": (b"Please find the image attached", nothing),
        "archive.png": (b"PK\x03\x04" + bytes(100), nothing),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", nothing),
        "bomb.png": (png(60_000, 60_000), large),
        "bomb.ppm": (b"P6 60000 60000 255\n", large),
        "bomb.tiff": (tiff(bytes(9), 60_000, 60_000, bits=8), large),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\x80\0\0" + bytes(6) + b"," + bytes(12), large),
        "large.png": (png(10_000, 10_000), r"^has 100,000,000 pixels, at most"),
    }


MODES = _modes()
"""By name: the file, its pixels, and how near is enough."""

DAMAGES = _damages()
"""By name: the file, and a pattern of the reason. `damages` makes two more, which cannot be read at all."""
