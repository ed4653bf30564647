"""Images and what is said of them, as one HTML page that needs nothing but itself."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mlflow_ssl.datasets.decode import DecodeError, decode

SIDE = 128
"""Pixels of a thumbnail's longer side, at most."""

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 14px system-ui, sans-serif; margin: 16px; color: #1f272e; }}
  h1 {{ font-size: 18px; }} h2 {{ font-size: 15px; margin: 22px 0 6px; }}
  .row {{ display: flex; flex-wrap: wrap; gap: 10px; border-bottom: 1px solid #e4e7eb; padding: 8px 0; }}
  figure {{ margin: 0; width: {side}px; }}
  img {{ min-width: 64px; max-width: {side}px; image-rendering: pixelated; border: 1px solid #e4e7eb; }}
  figcaption {{ font-size: 12px; overflow-wrap: anywhere; color: #5f6b76; }}
</style>
<h1>{title}</h1>
{sections}
"""


@dataclass(frozen=True)
class Shown:
    """An image of a sheet: its file, if there is one, and what is said of it."""

    file: Path | None
    words: str


def sheet_html(title: str, sections: Sequence[tuple[str, Sequence[Sequence[Shown]]]]) -> str:
    """Return a page of sections, each with a heading and rows of images.

    File names and classes are other people's text: all of it is escaped.
    """
    written = [
        f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(_row(row) for row in rows) for heading, rows in sections
    ]
    return _PAGE.format(title=html.escape(title), side=SIDE, sections="\n".join(written))


def _row(row: Sequence[Shown]) -> str:
    return f'<div class="row">{"".join(map(_figure, row))}</div>'


def _figure(shown: Shown) -> str:
    image = thumbnail(shown.file) if shown.file else None
    picture = f'<img src="data:image/webp;base64,{image}" alt="">' if image else ""
    return f"<figure>{picture}<figcaption>{html.escape(shown.words)}</figcaption></figure>"


def thumbnail(file: Path) -> str | None:
    """Return an image file as a small WebP in base64; None where it cannot be read."""
    try:
        image = Image.fromarray(decode(file.read_bytes(), at_least=SIDE))
    except (OSError, DecodeError):
        return None
    image.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    image.save(written, "WEBP", quality=80)
    return base64.b64encode(written.getvalue()).decode()
