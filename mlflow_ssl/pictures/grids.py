"""Grids of images: the views that a network is trained on, and what it takes for similar.

Images are ``(3, H, W)`` tensors as the network sees them; ``mean`` and ``std`` say how they were normalized.
"""

import base64
import io
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mlflow_ssl.pictures.style import INK, PALE_INK, RIGHT, WRONG, font, shorten

SMALLEST, LARGEST = 64, 160
"""Longer side of a cell in px: smaller images are enlarged, larger ones reduced."""

PAIR_GAP, VIEW_GAP, TILE_GAP, QUERY_GAP = 12, 2, 6, 18
FRAME, THIN, THICK = 6, 2, 5
"""Width around an image, and of the frames drawn in it."""

CROSS = 15
CAPTION, HEADER = 16, 34


def view_pairs(view_1: Tensor, view_2: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draw both views of each image side by side.

    Args:
        view_1: shape ``(B, 3, H, W)``.
        view_2: likewise, of the same images.
        mean: of each channel.
        std: of each channel.

    Raises:
        ValueError: if the two shapes differ, or there is no image.
    """
    if view_1.shape != view_2.shape or not len(view_1):
        raise ValueError(
            f"view_1 and view_2 must be images of one shape, got {tuple(view_1.shape)} and {tuple(view_2.shape)}"
        )
    pairs = [
        _grid([[_cell(view, mean, std) for view in pair]], gap=VIEW_GAP) for pair in zip(view_1, view_2, strict=True)
    ]
    columns = math.ceil(math.sqrt(len(pairs) / 2))  # a pair is twice as wide as high
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    return _padded(_grid(rows, gap=PAIR_GAP), left=PAIR_GAP, top=PAIR_GAP, right=PAIR_GAP, bottom=PAIR_GAP)


def neighbours(
    queries: Tensor,
    neighbours: Tensor,
    right: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    query_names: Sequence[str] | None = None,
    neighbour_names: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """Draw each query at the left of a row, and its neighbours beside it.

    A neighbour of the query's class has a thin green frame, one of another class a thick red one with a cross.

    Args:
        queries: shape ``(Q, 3, H, W)``.
        neighbours: shape ``(Q, K, 3, H, W)``, closest first.
        right: whether a neighbour is of the query's class, bool of shape ``(Q, K)``.
        mean: of each channel.
        std: of each channel.
        query_names: class of each query, to be written below it.
        neighbour_names: likewise, of each neighbour.

    Raises:
        ValueError: if the shapes do not fit each other, or there is no query.
    """
    if not len(queries) or len(queries) != len(neighbours) or neighbours.shape[:2] != right.shape:
        raise ValueError(
            "queries, neighbours and right must be of shape (Q, ...), (Q, K, ...) and (Q, K), got "
            f"{tuple(queries.shape)}, {tuple(neighbours.shape)} and {tuple(right.shape)}"
        )
    asked = _grid([[_tile(_cell(image, mean, std), name=name)] for image, name in _named(queries, query_names)])
    rows = []
    for number, images in enumerate(neighbours):
        named = _named(images, None if neighbour_names is None else neighbour_names[number])
        rows.append(
            [
                _tile(_cell(image, mean, std), name=name, right=bool(same))
                for (image, name), same in zip(named, right[number], strict=True)
            ]
        )
    whole = _padded(_grid([[asked, _grid(rows)]], gap=QUERY_GAP), left=TILE_GAP, top=HEADER, right=TILE_GAP, bottom=4)
    _write_header(whole, beside=TILE_GAP + asked.width + QUERY_GAP)
    return whole


def thumbnail(image: Tensor, *, mean: Sequence[float], std: Sequence[float], side: int = 64) -> str:
    """Return an image ``(3, H, W)``, at most ``side`` px large, as an address that holds its bytes.

    Example:
        >>> thumbnail(torch.zeros(3, 8, 8), mean=[0.5] * 3, std=[1] * 3)[:22]
        'data:image/png;base64,'
    """
    picture = _picture(image, mean, std)
    picture.thumbnail((side, side))
    kind = "png" if max(picture.size) <= 32 else "jpeg"  # tiny JPEGs are mostly header, and blurred
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    shares = image.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = shares.clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _cell(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    picture = _picture(image, mean, std)
    side = max(picture.size)
    if side < SMALLEST:  # by a whole number, so that every pixel stays a square
        return picture.resize([n * math.ceil(SMALLEST / side) for n in picture.size], Image.Resampling.NEAREST)
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def _tile(cell: Image.Image, *, name: str | None = None, right: bool | None = None) -> Image.Image:
    """Return a cell with room for a frame around it and, where there is a name, for a caption below."""
    tile = _padded(cell, left=FRAME, top=FRAME, right=FRAME, bottom=FRAME + (0 if name is None else CAPTION))
    pen = ImageDraw.Draw(tile)
    width, height = cell.width + 2 * FRAME, cell.height + 2 * FRAME
    if right is not None:
        thickness = THIN if right else THICK
        inset = FRAME - thickness
        box = (inset, inset, width - 1 - inset, height - 1 - inset)
        pen.rectangle(box, outline=RIGHT if right else WRONG, width=thickness)
    if right is False:
        _draw_cross(pen, corner=(width - 1 - (FRAME - THICK), FRAME - THICK))
    if name is not None:
        words = shorten(name, lambda text: font(11).getlength(text) <= width)
        pen.text((width / 2, height + 1), words, INK, font(11), anchor="ma")
    return tile


def _draw_cross(pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    x, y = corner
    pen.rectangle((x - CROSS, y, x, y + CROSS), fill=WRONG)
    for start, end in ((4, CROSS - 4), (CROSS - 4, 4)):
        pen.line((x - CROSS + 4, y + start, x - 4, y + end), fill="white", width=2)


def _write_header(whole: Image.Image, *, beside: int) -> None:
    pen = ImageDraw.Draw(whole)
    pen.text((TILE_GAP + FRAME, 9), "query", INK, font(12))
    x = float(beside + FRAME)
    for swatch, words in ((None, "nearest neighbours, closest first"), (True, "same class"), (False, "another class")):
        if swatch is not None:
            key = _tile(Image.new("RGB", (18, 18), "#dddddd"), right=swatch)
            whole.paste(key, (int(x), 2))
            x += key.width + 4
        pen.text((x, 9), words, PALE_INK, font(12))
        x += pen.textlength(words, font(12)) + 22


def _named(images: Tensor, names: Sequence[str] | None) -> list[tuple[Tensor, str | None]]:
    return list(zip(images, [None] * len(images) if names is None else names, strict=True))


def _grid(rows: Sequence[Sequence[Image.Image]], *, gap: int = TILE_GAP) -> Image.Image:
    """Return pictures of one size side by side, rows below each other."""
    width = max(sum(picture.width + gap for picture in row) - gap for row in rows)
    height = sum(row[0].height + gap for row in rows) - gap
    grid = Image.new("RGB", (width, height), "white")
    y = 0
    for row in rows:
        x = 0
        for picture in row:
            grid.paste(picture, (x, y))
            x += picture.width + gap
        y += row[0].height + gap
    return grid


def _padded(picture: Image.Image, *, left: int, top: int, right: int, bottom: int) -> Image.Image:
    whole = Image.new("RGB", (picture.width + left + right, picture.height + top + bottom), "white")
    whole.paste(picture, (left, top))
    return whole
