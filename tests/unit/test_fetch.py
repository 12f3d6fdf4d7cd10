"""Fetching for the examples: pinned, checked, whole or absent; and what is made of it, where the cache holds it."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import fetch
from examples.efficientnet_lite0 import demo, network, photos


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeCommands:
    """Stands in for pip, apt-get and dpkg-deb: leaves `file` where they would, or fails as told."""

    def __init__(self, file: str, content: bytes) -> None:
        self.file, self.content, self.ran = file, content, []
        self.reasons: dict[str, str] = {}

    def __call__(self, command: list[str], folder: Path) -> str:
        self.ran.append(command)
        reason = next((r for word, r in self.reasons.items() if word in command), "")
        if not reason and command[0] == "dpkg-deb":
            (Path(command[-1]) / "usr").mkdir(parents=True)
        elif not reason and "download" in command:
            (folder / self.file).write_bytes(self.content)
        return reason


def install(monkeypatch: pytest.MonkeyPatch, file: str = "sample-1.0-py3-none-any.whl") -> tuple[FakeCommands, str]:
    commands = FakeCommands(file, b"content of a package")
    monkeypatch.setattr(fetch, "_run", commands)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    return commands, hashlib.sha256(commands.content).hexdigest()


def list_leftovers(cache: Path) -> list[Path]:
    return list(cache.glob(".fetch-*"))


class TestFetch:
    def test_a_wheel_is_fetched_once(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands, sha256 = install(monkeypatch)
        kept = fetch.fetch_wheel("sample", "1.0", sha256, fetch.LINUX_311)
        assert kept.read_bytes() == commands.content
        assert fetch.fetch_wheel("sample", "1.0", sha256) == kept
        assert len(commands.ran) == 1
        assert {"--no-deps", "sample==1.0", "manylinux2014_x86_64"} < set(commands.ran[0])
        assert list_leftovers(cache) == []

    def test_another_file_is_refused_and_not_kept(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch)
        with pytest.raises(fetch.FetchError, match="not the pinned file"):
            fetch.fetch_wheel("sample", "1.0", "0" * 64)
        assert list(cache.iterdir()) == []

    def test_no_index(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands, sha256 = install(monkeypatch)
        commands.reasons["pip"] = "ERROR: No matching distribution"
        with pytest.raises(fetch.FetchError, match=r"sample 1\.0 .*No matching distribution.*package index"):
            fetch.fetch_wheel("sample", "1.0", sha256)
        assert list(cache.iterdir()) == []

    def test_a_debian_package(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands, sha256 = install(monkeypatch, "sample_1.0_all.deb")
        root = fetch.fetch_debian("sample", "1.0", sha256)
        assert (root / "usr").is_dir()
        assert fetch.fetch_debian("sample", "1.0", sha256) == root
        assert [c[0] for c in commands.ran] == ["apt-get", "dpkg-deb"]
        assert list_leftovers(cache) == []

    def test_a_debian_package_without_a_mirror(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands, sha256 = install(monkeypatch, "sample_1.0_all.deb")
        commands.reasons["apt-get"] = "E: Unable to locate package sample"
        with pytest.raises(fetch.FetchError, match=r"Unable to locate package.*Debian mirror"):
            fetch.fetch_debian("sample", "1.0", sha256)
        assert ["update" in c for c in commands.ran] == [False, True, False]
        assert not (cache / "sample_1.0").exists()

    def test_off_debian(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, sha256 = install(monkeypatch)
        monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
        with pytest.raises(fetch.FetchError, match="no apt-get"):
            fetch.fetch_debian("sample", "1.0", sha256)

    def test_a_cache_that_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "file/cache"))
        with pytest.raises(fetch.FetchError, match="JETTISON_CACHE"):
            fetch.fetch_wheel("sample", "1.0", "0" * 64)

    def test_commands_give_their_last_words(self, tmp_path: Path) -> None:
        assert fetch._run(["python3", "-c", ""], tmp_path) == ""
        assert fetch._run(["python3", "-c", "raise OSError('no disk')"], tmp_path) == "OSError: no disk"
        assert fetch._run(["python3", "-c", "raise SystemExit(3)"], tmp_path) == "exit code 3"

    def test_a_wheel_is_unpacked_once(self, cache: Path) -> None:
        cache.mkdir()
        with zipfile.ZipFile(cache / "sample-1.0.whl", "w") as wheel:
            wheel.writestr("sample/data.txt", "one")
        folder = fetch.unpack_wheel(cache / "sample-1.0.whl")
        assert folder == cache / "sample-1.0"
        assert (folder / "sample/data.txt").read_text() == "one"
        assert fetch.unpack_wheel(cache / "sample-1.0.whl") == folder


def need(*packages: tuple[str, str, str]) -> None:
    """Skip where the cache lacks a package: tests use no network."""
    for name, version, _ in packages:
        cache = fetch.cache_folder()
        if not (cache / f"{name}-{version}.whl").is_file() and not (cache / f"{name}_{version}").is_dir():
            pytest.skip(f"{name} {version} is not in {cache}: run `python -m examples.efficientnet_lite0.photos a.png`")


class TestEfficientNetLite0:
    def test_the_smoke_gate(self, capsys: pytest.CaptureFixture[str]) -> None:
        need(network.CODE, network.WEIGHTS, photos.FOOLBOX)
        model = network.build()
        assert not model.training
        assert sum(p.numel() for p in model.parameters()) == 4_652_008
        pictures, labels = photos.labelled()
        assert pictures.shape == (20, 3, 224, 224)
        with torch.inference_mode():
            scores = model(pictures)
        assert demo.count_right(scores.numpy(), labels.numpy()) == (17, 20)
        assert demo.count_right(scores.roll(1, 0).numpy(), labels.numpy())[0] < 3  # the gate can fail

    def test_splits_share_nothing(self) -> None:
        need(photos.STAMPS)
        first, second = photos.list_cutouts("calibration"), photos.list_cutouts("held_out")
        kinds = [{re.split(r"[^a-z]", p.stem.lower())[0] for p in side} for side in (first, second)]
        assert len(first) > 200
        assert len(second) > 100
        assert not kinds[0] & kinds[1]
        names = [{(p, n) for p, names in photos.PHOTOS[s].items() for n in names.split()} for s in photos.COUNTS]
        assert not names[0] & names[1]

    def test_pictures_are_the_same_each_time_and_differ(self) -> None:
        need(photos.STAMPS, photos.MATE, photos.SKIMAGE, photos.SKLEARN)
        pictures = photos.make_pictures("held_out", 12)
        assert np.array_equal(pictures[:3], photos.make_pictures("held_out", 3))
        assert len(np.unique(pictures, axis=0)) == 12
        assert pictures.std(axis=(1, 2, 3)).min() > 5  # none is blank

    def test_preprocessing(self) -> None:
        pixels = np.array([0, 127, 255], dtype=np.uint8).reshape(1, 1, 1, 3)
        assert photos.preprocess(pixels).flatten().tolist() == [-127 / 128, 0.0, 1.0]

    def test_agreement_is_one_outcome_a_picture(self) -> None:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).eval()
        pictures = [torch.randn(5, 3, 2, 2), torch.randn(3, 3, 2, 2)]
        agreement = demo.make_agreement(model, pictures)
        assert agreement.__name__ == "agreement"
        with torch.no_grad():
            assert agreement(model).tolist() == [1.0] * 8
            wrong = agreement(lambda x: -model(x))
        assert wrong.shape == (8,)
        assert not wrong.any()

    def test_a_folder_of_ones_own_is_split(self, tmp_path: Path) -> None:
        from PIL import Image

        for i in range(10):
            Image.new("RGB", (40, 30), (i, 127, 255)).save(tmp_path / f"{i}.png")
        first, rest = demo.split_folder(tmp_path)
        assert (len(first.files), len(rest.files)) == (7, 3)
        assert not set(first.files) & set(rest.files)
        (x,) = rest
        assert x.shape == (3, 3, 224, 224)
        # Two divisions by constants that float32 cannot hold, against one.
        torch.testing.assert_close(x[:, 1:, 0, 0], torch.tensor([0.0, 1.0]).expand(3, 2), rtol=0, atol=1e-6)
