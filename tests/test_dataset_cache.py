"""The cache of packed arrays and the download: nothing half, nothing unchecked."""

import hashlib
import http.server
import importlib
import threading
import warnings
import zipfile

import numpy as np
import pytest
from dataset_files import PARTS, TWO, drawing, omniglot_files, png, write_zip

from fastmaml.tasks import omniglot
from fastmaml.tasks.datasets import archive, cache, download

module = importlib.import_module("fastmaml.tasks.datasets.omniglot")

# The cache


def build():
    return np.arange(12, dtype=np.uint8).reshape(3, 4), {"names": ["a", "b", "c"]}


def unexpected():
    raise AssertionError("built again")


def test_cache_keeps_arrays_and_notes(tmp_path):
    cache.load_or_build(tmp_path / "new", "entry", build)
    array, notes = cache.load_or_build(tmp_path / "new", "entry", unexpected)
    assert np.array_equal(array, build()[0]) and notes == build()[1]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "entry.json",
        "entry.npy",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "json", "foreign"])
def test_damaged_entries_are_rebuilt_with_a_warning(tmp_path, damage):
    cache.load_or_build(tmp_path, "entry", build)
    file = tmp_path / "entry.npy"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    file.write_bytes({"cut": content[:-3], "empty": b""}.get(damage, content))
    if damage in ("json", "foreign"):
        text = "{" if damage == "json" else "{}"
        (tmp_path / "entry.json").write_text(text)
    with pytest.warns(UserWarning, match=r"entry.npy is damaged.*rebuilding"):
        array, _ = cache.load_or_build(tmp_path, "entry", build)
    assert np.array_equal(array, build()[0])
    cache.load_or_build(tmp_path, "entry", unexpected)


@pytest.mark.parametrize("missing", ["entry.json", "entry.npy"])
def test_unfinished_entries_are_built_silently(tmp_path, missing):
    cache.load_or_build(tmp_path, "entry", build)
    (tmp_path / missing).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.load_or_build(tmp_path, "entry", build)


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not write.*FASTMAML_CACHE"):
        array, _ = cache.load_or_build(tmp_path / "file", "entry", build)
    assert np.array_equal(array, build()[0])


def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), cache.atomic_write(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path))
    assert cache.cache_root() == tmp_path
    assert cache.cache_root(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("FASTMAML_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "fastmaml"


# The download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves ``tmp_path / "served"`` as the authors' repository."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http_server.server_port}"
        monkeypatch.setattr(download, "_URL", address)
        yield folder
        http_server.shutdown()


def expect(monkeypatch, folder):
    """Makes the archives served now the official ones."""
    for part in PARTS:
        path = folder / f"{part}.zip"
        write_zip(path, omniglot_files(part))
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(download.ARCHIVE_MD5, part, md5)
        with archive.Archive(path) as opened:
            content = download.content_sha256(opened)
        monkeypatch.setitem(download.CONTENT_SHA256, part, content)


def test_official_address_is_https():
    assert download._URL.startswith("https://raw.githubusercontent.com/brendenlake/")


def test_download_fetches_what_is_missing(server, tmp_path, monkeypatch):
    expect(monkeypatch, server)
    monkeypatch.setattr(module, "character_names", lambda: TWO)
    root = tmp_path / "fresh" / "root"
    arguments = {"split": "background", "download": True, "cache_dir": tmp_path}
    data = omniglot(root, **arguments)
    assert data.images[0, 3, 0].equal(omniglot(server, **arguments).images[0, 3, 0])
    assert sorted(p.name for p in root.iterdir()) == [f"{p}.zip" for p in PARTS]
    for part in PARTS:
        assert (root / f"{part}.zip").read_bytes() == (
            server / f"{part}.zip"
        ).read_bytes()
        (server / f"{part}.zip").unlink()
    omniglot(root, **arguments)  # all there: nothing is fetched


def test_an_archive_packed_anew_is_known_by_its_content(server, tmp_path, monkeypatch):
    expect(monkeypatch, server)
    path = server / "images_background.zip"
    write_zip(path, omniglot_files("images_background"), zipfile.ZIP_STORED)
    fetched = download.fetch("images_background", tmp_path / "root")
    assert fetched.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["pixel", "name", "cut", "page"])
def test_a_wrong_archive_is_refused_and_not_kept(server, tmp_path, monkeypatch, damage):
    expect(monkeypatch, server)
    path = server / "images_background.zip"
    files = omniglot_files("images_background")
    name, content = next(iter(files.items()))
    if damage == "pixel":
        pixels = drawing(0)
        pixels[5, 5] ^= 255
        write_zip(path, {**files, name: png(pixels)})
    elif damage == "name":
        write_zip(path, {**files, name.replace("_00", "_99"): content})
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] if damage == "cut" else b"<html>no</html>")
    with pytest.raises(ValueError, match="not the expected archive.*MD5.*Nothing was"):
        download.fetch("images_background", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_an_unreachable_server_is_named(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"could not fetch http://.*404"):
        download.fetch("images_background", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("part", PARTS)
def test_real_archives_have_the_recorded_content(data_dir, part):
    with archive.Archive(data_dir / "omniglot" / f"{part}.zip") as opened:
        assert download.content_sha256(opened) == download.CONTENT_SHA256[part]
