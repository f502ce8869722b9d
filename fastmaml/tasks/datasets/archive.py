"""Reads images alike from zip archives and from folders."""

from __future__ import annotations

import zipfile
from pathlib import Path

_DATA_SUFFIXES = (".png", ".jpg", ".jpeg", ".csv")


class Archive:
    """Files below a zip archive or a folder, by their path with forward slashes.

    Args:
        path: the archive or folder.

    Raises:
        ValueError: the archive is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is no zip archive ({error}); delete it and fetch it again"
            ) from error

    def names(self, suffix: str = "") -> list[str]:
        """Returns all files ending in ``suffix``, sorted.

        Resource forks, which macOS leaves in archives, are no files.
        """
        if self._zip is not None:
            names = self._zip.namelist()
        else:
            files = self.path.rglob(f"*{suffix}")
            names = [file.relative_to(self.path).as_posix() for file in files]
        return sorted(n for n in names if n.endswith(suffix) and not _is_fork(n))

    def read(self, name: str) -> bytes:
        """Returns the content of one file.

        Raises:
            ValueError: the archive is damaged there.
        """
        if self._zip is None:
            return (self.path / name).read_bytes()
        try:
            return self._zip.read(name)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{self.path} is damaged at {name} ({error}); delete it and fetch it "
                "again"
            ) from error

    def close(self) -> None:
        """Closes the archive."""
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> Archive:
        """Returns the archive itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the archive."""
        self.close()

    def signature(self) -> tuple[object, ...]:
        """Returns what tells this version of the files from another one."""
        if self._zip is not None:
            stat = self.path.stat()
            return (str(self.path.resolve()), stat.st_size, stat.st_mtime_ns)
        return (str(self.path.resolve()), *_listing(self.path))


def _is_fork(name: str) -> bool:
    return "__MACOSX/" in name or name.rpartition("/")[2].startswith("._")


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Images and lists alone, so that a cache kept in the folder does not count."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _DATA_SUFFIXES)
    stats = ((file, file.stat()) for file in files)
    return [(str(f), s.st_size, s.st_mtime_ns) for f, s in stats]


def first_existing(root: Path, *candidates: str) -> Path | None:
    """Returns the first of the candidates below ``root`` that exists."""
    return next((root / c for c in candidates if (root / c).exists()), None)
