import io

import numpy as np
import pytest
from PIL import Image

from mlflow_ssl.datasets.decode import EXTENSIONS, DecodeError, decode


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_decode_gives_rgb_bytes_as_they_are():
    pixels = noise(5, 7, 3)
    decoded = decode(encoded(Image.fromarray(pixels)))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


def test_decode_repeats_grey_in_three_channels():
    pixels = noise(5, 7)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels))), np.stack([pixels] * 3, axis=-1))


def test_decode_gives_bilevel_images_as_black_and_white():
    pixels = noise(5, 7) > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)))[..., 1], pixels * 255)


def palette_image():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    assert image.mode == "P"
    return image


PALETTE_PIXELS = [[[10, 20, 30], [200, 100, 0]], [[7, 8, 9], [200, 100, 0]]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_decode_looks_colours_up_in_the_palette(kind):
    np.testing.assert_array_equal(decode(encoded(palette_image(), kind)), PALETTE_PIXELS)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_decode_drops_transparency_of_a_palette_without_a_warning(transparency):
    data = encoded(palette_image(), transparency=transparency)
    with Image.open(io.BytesIO(data)) as image:
        assert "transparency" in image.info
    np.testing.assert_array_equal(decode(data), PALETTE_PIXELS)


def test_decode_drops_the_alpha_channel():
    pixels = noise(5, 7, 4)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels))), pixels[..., :3])


def test_decode_drops_the_alpha_channel_of_grey():
    grey, alpha = noise(5, 7, seed=1), noise(5, 7, seed=2)
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    np.testing.assert_array_equal(decode(encoded(image)), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode_scales_16_bits_instead_of_clipping_them(kind):
    deep = np.array([[0, 257, 300], [256 * 128, 65535, 257 * 200]], dtype=np.uint16)
    decoded = decode(encoded(Image.fromarray(deep), kind))
    expected = [[0, 1, 1], [128, 255, 200]]  # value / 257, rounded
    np.testing.assert_array_equal(decoded, np.stack([expected] * 3, axis=-1))
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_decode_turns_the_picture_upright_by_its_exif_orientation(orientation, turns):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(Image.fromarray(pixels), exif=exif))
    np.testing.assert_array_equal(decoded, np.rot90(pixels, turns))


def test_decode_gives_cmyk_in_rgb():
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan ink alone
    decoded = decode(encoded(image, "JPEG", quality=100))
    np.testing.assert_allclose(decoded, np.broadcast_to([0, 255, 255], (16, 16, 3)), atol=3)


def test_decode_refuses_a_truncated_jpeg():
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    assert decode(data).shape == (64, 64, 3)
    with pytest.raises(DecodeError, match=r"^is truncated$"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_decode_refuses_what_is_no_image(data):
    with pytest.raises(DecodeError):
        decode(data)


def test_extensions_are_lower_case_with_a_dot():
    assert all(ending == "." + ending[1:].lower() for ending in EXTENSIONS)
