"""A run is a folder: each finished stage is a file, and whoever starts the same run again goes on from there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from jettison.core.errors import CheckpointError, StorageError
from jettison.core.plain import read_json, to_plain, write_json
from jettison.core.record import Stage
from jettison.progress import announce

T = TypeVar("T")


@dataclass(frozen=True)
class RunHead:
    """What a run folder belongs to: a fingerprint of weights, inputs and settings."""

    format: str
    fingerprint: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StageTimes:
    """Seconds that each finished stage took when it was computed."""

    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    def do(
        self, name: str, file: str, load: Callable[[Path], T], compute: Callable[[], T], save: Callable[[T, Path], None]
    ) -> T:
        """Return a stage's result: from its file if that is there, else computed, written whole, then returned."""
        path = self.path / file
        if path.exists():
            return load(path)
        start = time.perf_counter()
        with announce(f"{name} …"):
            result = compute()
            save(result, path)
        self.note_time(name, time.perf_counter() - start)
        return result

    def do_json(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """Like `do`, for a dataclass kept in `NAME.json`."""
        save: Callable[[T, Path], None] = write_json
        return self.do(name, f"{name}.json", partial(read_json, kind), compute, save)

    def note_time(self, name: str, seconds: float) -> None:
        """Remember how long a stage took."""
        times = self._times()
        write_json(StageTimes({**times, name: times.get(name, 0.0) + seconds}), self.path / "stages.json")

    def list_stages(self) -> tuple[Stage, ...]:
        """Return the finished stages in the order they finished first."""
        return tuple(Stage(name, seconds) for name, seconds in self._times().items())

    def _times(self) -> dict[str, float]:
        path = self.path / "stages.json"
        return dict(read_json(StageTimes, path).seconds) if path.exists() else {}


def open_folder(path: Path, fingerprint: str, settings: Mapping[str, Any]) -> RunFolder:
    """Return the run's folder, made if need be; raises CheckpointError where another run lives there."""
    head = path / "run.json"
    if head.exists():
        found = read_json(RunHead, head)
        if found.fingerprint != fingerprint:
            mine = to_plain(settings)
            changed = [k for k in {**mine, **found.settings} if mine.get(k) != found.settings.get(k)]
            what = f"settings {', '.join(changed)} differ" if changed else "its weights or calibration data differ"
            raise CheckpointError(f"{path} holds another run: {what}. Choose another folder with out=, or delete it.")
        return RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}. Choose another folder with out=.") from error
    others = [p.name for p in path.iterdir() if not p.name.startswith(".")]
    if others:
        raise CheckpointError(
            f"{path} is not empty and holds no run ({others[0]}, ...). Choose another folder with out=."
        )
    write_json(RunHead("jettison.run/1", fingerprint, settings), head)
    return RunFolder(path)


def fingerprint(state: Mapping[str, Tensor], inputs: tuple[Tensor, ...], code: str, settings: Mapping[str, Any]) -> str:
    """Return a hash of weights, first inputs, graph and settings: the same run gives the same."""
    digest = hashlib.sha256()
    digest.update(json.dumps(to_plain(settings), sort_keys=True).encode())
    digest.update(code.encode())
    for name, tensor in [*sorted(state.items()), *((str(i), t) for i, t in enumerate(inputs))]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
