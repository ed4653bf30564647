"""The data set that comes along: scikit-learn's handwritten digits, as an image folder."""

import logging
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from mlflow_ssl.datasets.cache import cache_folder

log = logging.getLogger(__name__)

DIGITS = "embedded:digits"
"""The ``data_path`` that means the digits."""


def digits_folder() -> Path:
    """Return the folder of the digits: 1,797 grey images of 8x8 px in 10 class folders, written on first use.

    References:
        scikit-learn's ``load_digits``: the test set of UCI's optical recognition of handwritten digits (CC BY 4.0).
    """
    folder = cache_folder() / "digits"
    if folder.is_dir():
        return folder
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside and moved into place: another process never sees half of it
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch, "digits")
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            file = whole / str(label) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype("uint8")).save(file)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # only another process that was faster may be in the way
                raise
            shutil.rmtree(whole)
    log.info("wrote the embedded digits to %s", folder)
    return folder
