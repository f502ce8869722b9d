"""Fetches Omniglot's archives: the one place of the package that opens a connection."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import tempfile
import urllib.request
from pathlib import Path

from fastmaml.tasks.datasets.archive import Archive
from fastmaml.tasks.datasets.cache import progress_bar

_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_BLOCK = 1 << 16
_TIMEOUT = 30  # seconds without any data

# Of the archives in the authors' repository, as other loaders publish them.
ARCHIVE_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
# Of names and pixels, see ``content_sha256``: the same however they were compressed.
CONTENT_SHA256 = {
    "images_background": (
        "636a191984f8e3da550fd502ec1457f9265038c40ad91f87be78543e585f6896"
    ),
    "images_evaluation": (
        "483b37bbe180ace622ca14b1511ddc659340f7e61c7f7a7bf3be01cf14b74ed7"
    ),
}


def fetch(part: str, root: Path, *, progress: bool = True) -> Path:
    """Fetches one archive of Omniglot into ``root``.

    It appears there only after its check: either the archive's MD5 is the one published
    for the official file, or, should the authors pack it anew, the sha256 of its
    content (file names and pixels) is the one recorded here, taken from a copy in the
    official layout. MD5 guards against damage, not against forgery; for that there is
    HTTPS.

    Args:
        part: ``images_background`` or ``images_evaluation``.
        root: folder to put ``PART.zip`` in; made if missing.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ConnectionError: the archive could not be fetched.
        ValueError: what arrived is not the archive; nothing is kept of it.
    """
    url = f"{_URL}/{part}.zip"
    root.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=root, prefix=f".{part}.", suffix=".zip")
    os.close(handle)
    arrived = Path(temporary)
    try:
        md5 = _receive(url, arrived, progress)
        if md5 != ARCHIVE_MD5[part] and not _has_content(arrived, part):
            raise ValueError(
                f"{url} is not the expected archive: its MD5 is {md5}, expected "
                f"{ARCHIVE_MD5[part]}, and its content differs from the recorded one "
                "too. Nothing was kept; try again, or put the archive there yourself"
            )
        arrived.chmod(0o644)
        os.replace(arrived, root / f"{part}.zip")
    finally:
        arrived.unlink(missing_ok=True)
    return root / f"{part}.zip"


def content_sha256(archive: Archive) -> str:
    """Returns the sha256 of names and pixels of an archive's images.

    For every png in the order of names: the last three parts of its name, its width and
    height, and its pixels at one bit each, row by row.
    """
    from PIL import Image

    digest = hashlib.sha256()
    for name in archive.names(".png"):
        with Image.open(io.BytesIO(archive.read(name))) as image:
            bits = image.convert("1")
        digest.update("/".join(name.split("/")[-3:]).encode())
        digest.update(f" {bits.width}x{bits.height} ".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()


def _receive(url: str, target: Path, progress: bool) -> str:
    """Writes what ``url`` answers to ``target``; returns its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            blocks = iter(lambda: answer.read(_BLOCK), b"")
            text = f"fetching {url.rsplit('/', 1)[1]}"
            bar = progress_bar(
                blocks, total=-(-size // _BLOCK), text=text, show=progress
            )
            with target.open("wb") as file:
                for block in bar:
                    digest.update(block)
                    file.write(block)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not fetch {url} ({error}); fetch it by other means and put it into "
            f"root, {target.parent}"
        ) from error
    return digest.hexdigest()


def _has_content(path: Path, part: str) -> bool:
    try:
        with Archive(path) as archive:
            return content_sha256(archive) == CONTENT_SHA256[part]
    except (ValueError, OSError):
        return False
