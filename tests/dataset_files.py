"""Makes data set files small enough for tests, in the layouts of the real ones."""

import io
import zipfile

import numpy as np
from PIL import Image

TWO = ("Angelic/character01", "Greek/character01")  # evaluation, background
PARTS = ("images_background", "images_evaluation")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def drawing(seed: int) -> np.ndarray:
    """[105, 105] of 0 (ink) and 255."""
    paper = np.random.default_rng(seed).random((105, 105)) < 0.8
    return np.where(paper, 255, 0).astype(np.uint8)


def omniglot_files(part: str, drawings: int = 20) -> dict[str, bytes]:
    number = PARTS.index(part)
    character = TWO[1 - number]
    return {
        f"{part}/{character}/{number:04d}_{i:02d}.png": png(drawing(100 * number + i))
        for i in range(drawings)
    }


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as target:
        for name, content in files.items():
            target.writestr(name, content)


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def photo(seed: int, size=(84, 84)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def photos(labels, count=3):
    """Images by file name, and the csv that lists them."""
    files, rows = {}, ["filename,label"]
    for number, label in enumerate(labels):
        for i in range(count):
            files[f"images/{label}{i:05d}.jpg"] = photo(10 * number + i)
            rows.append(f"{label}{i:05d}.jpg,{label}")
    return files, "\n".join(rows) + "\n"
