"""A run folder: finished stages are kept, another run's folder is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.core.errors import CheckpointError, StorageError
from jettison.flow.folder import fingerprint, open_folder


@dataclass(frozen=True)
class Answer:
    value: int


SETTINGS = {"seed": 0, "budget": {"macs": 0.5}, "recipe": {"ratios": (0.5, 0.25)}}


def test_a_stage_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> Answer:
        calls.append(1)
        return Answer(42)

    folder = open_folder(tmp_path / "deep" / "run", "abc", SETTINGS)
    assert folder.do_json("answer", Answer, compute) == Answer(42) == folder.do_json("answer", Answer, compute)
    again = open_folder(tmp_path / "deep" / "run", "abc", SETTINGS)
    assert again.do_json("answer", Answer, compute) == Answer(42) and calls == [1]
    assert [s.name for s in again.list_stages()] == ["answer"]


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "abc", SETTINGS)

    def fail() -> Answer:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        folder.do_json("answer", Answer, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"] and folder.list_stages() == ()
    assert folder.do_json("answer", Answer, lambda: Answer(1)) == Answer(1)


@pytest.mark.parametrize("content", ["", "{", '{"value": "x"}', '{"value": 1, "more": 2}', "[1]"])
def test_a_corrupt_stage_is_named(tmp_path: Path, content: str) -> None:
    folder = open_folder(tmp_path, "abc", SETTINGS)
    (tmp_path / "answer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"answer\.json.*Remove it"):
        folder.do_json("answer", Answer, lambda: Answer(1))


def test_times_add_up(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "abc", SETTINGS)
    folder.note_time("a", 1.0)
    folder.note_time("b", 2.0)
    folder.note_time("a", 0.5)
    assert [(s.name, s.seconds) for s in folder.list_stages()] == [("a", 1.5), ("b", 2.0)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({**SETTINGS, "seed": 1}, "settings seed differ"),
        ({**SETTINGS, "seed": 1, "budget": {"macs": 0.4}}, "settings seed, budget differ"),
        (SETTINGS, "weights or calibration data differ"),
        ({**SETTINGS, "new": 1}, "settings new differ"),
        ({"seed": 0, "budget": {"macs": 0.5}}, "settings recipe differ"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    open_folder(tmp_path, "abc", SETTINGS)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_folder(tmp_path, "xyz", settings)
    assert "out=" in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds no run \(thesis\.tex"):
        open_folder(tmp_path, "abc", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "nonsense", '{"format": 1}', json.dumps({"format": "x", "fingerprint": "y"})])
def test_a_corrupt_head(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        open_folder(tmp_path, "abc", SETTINGS)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    for path in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(StorageError, match="cannot be made"):
            open_folder(path, "abc", SETTINGS)


def test_a_partial_head_is_no_run(tmp_path: Path) -> None:
    """What a kill in the middle of the first write leaves does not stand in the way."""
    (tmp_path / ".run.json.partial").write_bytes(b"{")
    open_folder(tmp_path, "abc", SETTINGS)


def test_fingerprint_sees_every_part() -> None:
    state = {"w": torch.ones(2, 2), "b": torch.zeros(())}
    inputs = (torch.zeros(3),)
    base = fingerprint(state, inputs, "code", SETTINGS)
    assert base == fingerprint({k: state[k] for k in ("b", "w")}, inputs, "code", dict(reversed(SETTINGS.items())))
    others = [
        fingerprint({**state, "w": torch.ones(2, 2) + 1e-6}, inputs, "code", SETTINGS),
        fingerprint({**state, "w": torch.ones(4)}, inputs, "code", SETTINGS),
        fingerprint({**state, "w": torch.ones(2, 2).double()}, inputs, "code", SETTINGS),
        fingerprint(state, (torch.ones(3),), "code", SETTINGS),
        fingerprint(state, inputs, "other", SETTINGS),
        fingerprint(state, inputs, "code", {**SETTINGS, "seed": 1}),
    ]
    assert len({base, *others}) == 7
