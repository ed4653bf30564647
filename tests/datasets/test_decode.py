import io

import numpy as np
import pytest
from damage import damages, gradient, modes, saved
from PIL import Image

from mlflow_ssl.datasets.decode import EXTENSIONS, DecodeError, decode, measure


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


@pytest.mark.parametrize("name", list(modes()))
def test_every_mode_becomes_rgb(name):
    data, colour = modes()[name]
    decoded = decode(data)
    assert decoded.dtype == np.uint8
    assert not decoded.flags.writeable
    np.testing.assert_allclose(decoded, np.broadcast_to(colour, (10, 12, 3)), atol=3)
    assert measure(data) == (12, 10)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", list(damages()))
@pytest.mark.parametrize("read", [decode, measure, lambda data: decode(data, at_least=4)])
def test_every_damage_is_refused_with_its_reason_in_one_line(name, read):
    data, reason = damages()[name]
    with pytest.raises(DecodeError, match=reason) as caught:
        read(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_obeyed(kind, orientation):
    picture = np.asarray(gradient(16, 24)) // 64 * 64  # as JPEG keeps it
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
    data = saved(Image.fromarray(picture), kind, exif=exif, **options)
    apart = np.abs(decode(data).astype(int) - turned)
    assert apart.mean() < (3 if kind == "JPEG" else 0.01)
    assert measure(data) == turned.shape[1::-1]


def test_a_broken_note_on_the_orientation_is_no_broken_picture():
    data = saved(gradient(), "JPEG", exif=b"Exif\x00\x00broken" + bytes(range(60)))
    assert decode(data).shape == (48, 64, 3)


def test_an_image_within_the_limit_is_decoded_and_one_beyond_is_not():
    data = saved(gradient(), "PNG")
    assert decode(data, max_pixels=48 * 64).shape == (48, 64, 3)
    for read in (decode, measure):
        with pytest.raises(DecodeError, match=r"^has 3,072 pixels, at most 3,071 are decoded$"):
            read(data, max_pixels=48 * 64 - 1)


@pytest.mark.parametrize(
    ("at_least", "shape"), [(600, (960, 1280)), (480, (480, 640)), (241, (480, 640)), (100, (120, 160))]
)
def test_a_large_jpeg_is_decoded_as_small_as_is_enough(at_least, shape):
    data = saved(gradient(960, 1280), "JPEG")
    assert decode(data, at_least=at_least).shape == (*shape, 3)
    assert measure(data) == (1280, 960)


def test_what_is_decoded_at_a_part_of_its_size_looks_the_same_when_it_is_resized():
    rng = np.random.default_rng(0)
    texture = Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).resize((1600, 1200))
    data = saved(Image.blend(gradient(1200, 1600), texture, 0.5), "JPEG", quality=92)
    small, whole = decode(data, at_least=500), decode(data)
    assert small.shape == (600, 800, 3)
    views = [
        np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), int) for image in (small, whole)
    ]
    # a grey level on average, as the choice of area instead of bicubic makes
    area = np.asarray(Image.fromarray(whole).resize((224, 224), Image.Resampling.BOX), int)
    apart, usual = (np.abs(views[1] - other).mean() for other in (views[0], area))
    assert apart < 1
    assert apart < usual


@pytest.mark.filterwarnings("ignore")  # Pillow has something to say on some of them
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
def test_bytes_that_were_changed_are_decoded_or_refused_and_nothing_else(kind):
    whole, rng = saved(gradient(), kind), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(len(whole) // 2, len(whole) + 1)])
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place] = rng.integers(256)
        outcomes = []
        for read in (decode, measure):
            try:
                read(bytes(data), max_pixels=10**7)
                outcomes.append("read")
            except DecodeError:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1]
