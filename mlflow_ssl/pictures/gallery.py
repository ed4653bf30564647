"""All pictures of a run on one page, with a slider over its steps.

MLflow's own picture charts list every parameter of the run above the picture, and a run of ours has hundreds.
"""

import base64
import html
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_STEPS = 24
"""Steps that a page holds, evenly taken, the first and the last among them."""

_NAME = re.compile(r"(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+.*\+compressed\.webp")

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Pictures over the steps</title>
<style>
  body {{ font: 14px system-ui, sans-serif; margin: 12px; color: #1f272e; }}
  header {{ position: sticky; top: 0; padding: 6px 0; background: #fff; }}
  header {{ display: flex; gap: 12px; align-items: center; }}
  input {{ flex: 1; max-width: 640px; }}
  h2 {{ font-size: 14px; margin: 18px 0 6px; }}
  img {{ max-width: 100%; border: 1px solid #e4e7eb; }}
</style>
<header><label for="at">step</label><input id="at" type="range" min="0" max="{last}" value="{last}" step="1">
<output id="step"></output></header>
<main id="pictures"></main>
<script>
  const steps = {steps}, pictures = {pictures};
  const slider = document.getElementById("at");
  function show() {{
    const step = steps[slider.value];
    document.getElementById("step").textContent = step.toLocaleString();
    const main = document.getElementById("pictures");
    main.replaceChildren(...Object.entries(pictures).flatMap(([key, byStep]) => {{
      // a picture stays until there is a newer one
      const shown = Object.keys(byStep).map(Number).filter(at => at <= step).pop();
      if (shown === undefined) return [];
      const title = document.createElement("h2"), image = document.createElement("img");
      title.textContent = shown === step ? key : key + " (step " + shown.toLocaleString() + ")";
      image.src = "data:image/webp;base64," + byStep[shown];
      image.alt = key;
      return [title, image];
    }}));
  }}
  slider.addEventListener("input", show);
  show();
</script>
"""


def read_pictures(folder: Path) -> dict[str, dict[int, bytes]]:
    """Return the small versions of the pictures that a run has logged, by key and step."""
    pictures: dict[str, dict[int, bytes]] = defaultdict(dict)
    for file in sorted(folder.glob("*+compressed.webp")):
        found = _NAME.fullmatch(file.name)
        if found:
            pictures[found["key"].replace("~", "/")][int(found["step"])] = file.read_bytes()
    return dict(pictures)


def gallery_html(pictures: Mapping[str, Mapping[int, bytes]]) -> str:
    """Return a page that needs nothing but itself.

    Args:
        pictures: WebP files by key and step.

    Raises:
        ValueError: if there is none.
    """
    if not pictures:
        raise ValueError("pictures must hold at least one")
    steps = thinned(sorted({step for by_step in pictures.values() for step in by_step}))
    kept = {
        html.escape(key): {step: base64.b64encode(by_step[step]).decode() for step in steps if step in by_step}
        for key, by_step in sorted(pictures.items(), key=lambda item: item[0] != "views/pairs")
    }
    return _PAGE.format(last=len(steps) - 1, steps=json.dumps(steps), pictures=json.dumps(kept))


def thinned(steps: Sequence[int]) -> list[int]:
    """Return at most `MOST_STEPS` of some steps, the first and the last among them.

    Example:
        >>> len(thinned(range(100))), thinned(range(100))[-1]
        (24, 99)
    """
    if len(steps) <= MOST_STEPS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]
