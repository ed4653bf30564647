import ast
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from damage import DAMAGES, MODES, damages, gradient, modes, saved
from PIL import Image

from mlflow_ssl.datasets import decode as module
from mlflow_ssl.datasets.decode import DecodeError, decode, measure

READS = {"decode": decode, "measure": measure, "scaled": lambda data, **limit: decode(data, at_least=4, **limit)}


@pytest.fixture(scope="module")
def mode_files(tmp_path_factory):
    return modes(tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def damaged_files(tmp_path_factory):
    return damages(tmp_path_factory.mktemp("damages"))


def outcome(read, data):
    try:
        read(data, max_pixels=10**7)
    except DecodeError as error:
        return str(error)
    return "read"


def refused(data):
    """Return whether the ways to read agree that this is no image."""
    (together,) = {outcome(read, data) != "read" for read in READS.values()}
    return together


def test_the_module_imports_nothing_of_ours():
    tree = ast.parse(Path(module.__file__).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "numpy", "PIL"}


# what is read


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_bytes(name, mode_files):
    path, expected, tolerance = mode_files[name]
    data = path.read_bytes()
    for pixels in (decode(data), decode(data, at_least=10)):
        assert pixels.dtype == np.uint8
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    assert measure(data) == (12, 10)


def test_pixels_cannot_be_written_to(mode_files):
    for path, _, _ in mode_files.values():
        with pytest.raises(ValueError, match="read-only"):
            decode(path.read_bytes())[0, 0] = 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_rounded_and_not_clipped(kind):
    deep = np.array([[0, 128, 129, 257, 300], [256 * 128, 65535, 257 * 200, 65406, 65407]], dtype=np.uint16)
    expected = [[0, 0, 1, 1, 1], [128, 255, 200, 254, 255]]  # value / 257
    np.testing.assert_array_equal(decode(saved(Image.fromarray(deep), kind))[..., 0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.5, 1.0]], [[0, 128, 255]]),  # fractions
        ([[0.2, 0.2, 0.4]], [[51, 51, 102]]),  # likewise: not stretched
        ([[0.0, 0.5, 1.02]], [[0, 125, 255]]),  # sharpened, so a little beyond: stretched
        ([[-10.0, 0.0, 190.0]], [[0, 13, 255]]),
        ([[0.0, np.nan, np.inf]], [[0, 0, 0]]),
        ([[3e38, -3e38, 0.0]], [[255, 0, 128]]),
    ],
)
def test_floating_point_values_are_fractions_or_stretched(values, expected):
    image = Image.fromarray(np.array(values, dtype=np.float32))
    np.testing.assert_array_equal(decode(saved(image, "TIFF"))[..., 2], expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "deflated TIFF", "deep TIFF", "deep PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_obeyed(kind, orientation):
    depth, _, kind = kind.rpartition(" ")
    picture = np.asarray(gradient(16, 24)) // 64 * 64  # as JPEG keeps it
    picture = np.stack([picture[..., 1]] * 3, axis=-1) if depth == "deep" else picture
    turned = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    options |= {"compression": "tiff_adobe_deflate"} if depth == "deflated" else {}
    image = Image.fromarray(picture[..., 1].astype(np.uint16) * 257 if depth == "deep" else picture)
    data = saved(image, kind, exif=exif, **options)
    apart = np.abs(decode(data).astype(int) - turned)
    assert apart.mean() < (3 if kind == "JPEG" else 0.01)
    assert measure(data) == turned.shape[1::-1]


def test_a_broken_note_on_the_orientation_is_no_broken_picture():
    data = saved(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + bytes(range(60)))
    for action in ("error", "always"):
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter(action)
            assert decode(data).shape == (48, 64, 3)
            assert measure(data) == (64, 48)
        assert remarks == []


# what is not


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_refused_with_its_reason_in_one_line(name, read, damaged_files):
    path, reason = damaged_files[name]
    with pytest.raises(DecodeError, match=reason) as caught:
        read(path.read_bytes())
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_for_decoding(damaged_files):
    for name in damaged_files.keys() - DAMAGES.keys():
        path, reason = damaged_files[name]
        with pytest.raises(OSError, match=reason):
            path.read_bytes()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_off_anywhere_is_refused_whatever_is_made_of_it(mode, options):
    whole = saved(gradient().convert(mode), "JPEG", **options)
    assert not refused(whole)
    for end in np.linspace(3, len(whole) - 1, 60).astype(int):
        assert refused(whole[:end])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "deflated TIFF"])
def test_bytes_that_were_changed_are_read_or_refused_and_nothing_else(kind, recwarn):
    compression, _, kind = kind.rpartition(" ")
    whole = saved(gradient(), kind, **({"compression": "tiff_adobe_deflate"} if compression else {}))
    rng, seen = np.random.default_rng(0), set()
    for number in range(60):
        data = bytearray(whole if number % 2 else whole[: rng.integers(len(whole) // 2, len(whole))])
        for place in rng.integers(len(data) if number % 3 else 64, size=rng.integers(1, 6)):
            data[place] = rng.integers(256)
        seen.add(refused(bytes(data)))
    assert True in seen
    assert not refused(whole)
    assert not recwarn.list


def test_an_image_within_the_limit_is_decoded_and_one_beyond_is_not(mode_files):
    for path, _, _ in mode_files.values():
        data = path.read_bytes()
        for read in READS.values():
            read(data, max_pixels=120)
            with pytest.raises(DecodeError, match=r"^has 120 pixels, at most 119 are decoded$"):
                read(data, max_pixels=119)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "GIF", "PNG"])
def test_a_larger_limit_is_above_that_of_pillow(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = saved(gradient(), kind)
    if kind in ("TIFF", "WEBP"):
        with pytest.raises(DecodeError, match=r"^has more than 2,000 pixels$"):
            decode(data)
    for read in READS.values():
        read(data, max_pixels=48 * 64)


def test_running_out_of_memory_is_not_blamed_on_the_image(tmp_path):
    (tmp_path / "large.png").write_bytes(saved(Image.new("RGB", (8000, 8000)), "PNG", compress_level=1))
    program = f"""
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("alone", {module.__file__!r})
alone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alone)
data = open({str(tmp_path / "large.png")!r}, "rb").read()
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 50_000_000,) * 2)
try:
    alone.decode(data)
except MemoryError:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


# at a part of the size


@pytest.mark.parametrize(
    ("at_least", "shape"),
    [(961, (960, 1280)), (481, (960, 1280)), (480, (480, 640)), (241, (480, 640)), (1, (120, 160))],
)
def test_a_large_jpeg_is_decoded_as_small_as_is_enough(at_least, shape):
    data = saved(gradient(960, 1280), "JPEG")
    assert decode(data, at_least=at_least).shape == (*shape, 3)
    assert measure(data) == (1280, 960)


def test_a_size_that_libjpeg_cannot_halve_is_rounded_up():
    assert decode(saved(gradient(95, 121), "JPEG"), at_least=40).shape == (48, 61, 3)


def test_other_formats_are_decoded_whole(mode_files):
    for kind in ("PNG", "WEBP", "TIFF", "BMP"):
        assert decode(saved(gradient(), kind), at_least=4).shape == (48, 64, 3)


def test_the_size_that_is_enough_must_be_one():
    with pytest.raises(ValueError, match=r"^at_least must be at least 1, got 0$") as caught:
        decode(saved(gradient(), "JPEG"), at_least=0)
    assert not isinstance(caught.value, DecodeError)


def scene(height, width):
    """Return a picture with slopes, texture at several scales, and sharp edges."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(gradient(height, width)) * 0.6 + 40
    for scale in (2, 8, 32, 128):
        noise = rng.standard_normal((height // scale + 2, width // scale + 2))
        pixels += 3 * np.log2(scale) * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    for top, left in zip(rng.integers(height, size=40), rng.integers(width, size=40), strict=True):
        pixels[top : top + height // 9, left : left + height // 9] = rng.integers(0, 256, 3)
    for start in range(0, width, width // 12):
        cv2.line(pixels, (start, 0), (width - start, height), (0, 0, 0), 2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def crop(image, share, interpolation):
    """Return a share of the sides, from the middle, as 112 x 112 pixels."""
    factor = image.shape[0] // 456
    edges = [(round(side * (1 - share) / 2) * factor, round(side * (1 + share) / 2) * factor) for side in (456, 616)]
    part = np.ascontiguousarray(image[slice(*edges[0]), slice(*edges[1])])
    return cv2.resize(part, (112, 112), interpolation=interpolation).astype(float)


def mean_error(first, second):
    return np.abs(first - second).mean()


def psnr(first, second):
    return 10 * np.log10(255**2 / np.square(first - second).mean())


@pytest.mark.parametrize(
    ("share", "most_error", "least_psnr"),
    [
        (1.0, 0.5, 47),  # the picture
        (0.283, 2.5, 34),  # the smallest crop of BYOL, 8 % of it: 4 times the crop's size is just enough for it
    ],
)
@pytest.mark.parametrize("subsampling", [0, 2])
def test_views_of_a_jpeg_decoded_at_a_part_of_its_size_look_the_same(share, most_error, least_psnr, subsampling):
    # as far apart as it gets: half of 912 is only just 4 * 112
    data = saved(scene(912, 1232), "JPEG", quality=90, subsampling=subsampling)
    small, whole = decode(data, at_least=4 * 112), decode(data)
    assert small.shape == (456, 616, 3)
    expected, got = crop(whole, share, cv2.INTER_AREA), crop(small, share, cv2.INTER_AREA)
    assert mean_error(got, expected) < most_error
    assert psnr(got, expected) > least_psnr
    # less than it matters that albumentations shrinks a crop by cubic interpolation, which passes over pixels
    assert mean_error(got, expected) < mean_error(crop(whole, share, cv2.INTER_CUBIC), expected)
