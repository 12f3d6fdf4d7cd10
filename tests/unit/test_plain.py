"""Dataclasses to JSON and back, strictly, and files that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jettison.core import plain
from jettison.core.errors import CheckpointError, StorageError
from jettison.core.plain import from_plain, read_json, to_plain, write_bytes, write_json
from jettison.core.plan import Cost, Plan, PlanPoint


@dataclass(frozen=True)
class Leaf:
    name: str
    share: float
    span: tuple[int | None, ...]
    maybe: float | None
    on: bool


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    by_name: Mapping[str, Leaf]
    pair: tuple[int, str]


leaves = st.builds(
    Leaf,
    st.text(max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.none() | st.integers(), max_size=3).map(tuple),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
trees = st.builds(
    Tree,
    st.lists(leaves, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), leaves, max_size=3),
    st.tuples(st.integers(), st.text(max_size=3)),
)


@given(trees)
def test_round_trip(tree: Tree) -> None:
    assert from_plain(Tree, json.loads(json.dumps(to_plain(tree)))) == tree


LEAF = {"name": "a", "share": 0.5, "span": [1, None], "maybe": None, "on": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra": 1}, "extra"),
        ({"name": 3}, "name"),
        ({"share": "half"}, "share"),
        ({"share": True}, "share"),
        ({"span": [1, "x"]}, r"span\[1\]"),
        ({"span": 3}, "span"),
        ({"maybe": "x"}, "maybe"),
        ({"on": 1}, "on"),
        ({"name": None}, "name"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        from_plain(Leaf, {**LEAF, **change})


def test_a_missing_field_is_no_default() -> None:
    with pytest.raises(CheckpointError, match="share"):
        from_plain(Leaf, {k: v for k, v in LEAF.items() if k != "share"})


def test_a_whole_number_is_no_truth_value() -> None:
    with pytest.raises(CheckpointError):
        from_plain(int, True)


@pytest.mark.parametrize("data", [[], 3, "x", None, [LEAF]])
def test_another_shape_altogether(data: Any) -> None:
    with pytest.raises(CheckpointError):
        from_plain(Tree, data)


def test_what_is_not_plain_is_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        to_plain({"a": {1, 2}})


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": float("nan")}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_survives(tmp_path: Path) -> None:
    cost = Cost(10, 20, None)
    plan = Plan("jettison.plan/1", {"a": (0, 2)}, 8, 0.5, cost, True, (PlanPoint({"a": 2}, 0.5, cost),))
    write_json(plan, tmp_path / "deep" / "plan.json")
    assert read_json(Plan, tmp_path / "deep" / "plan.json") == plan


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"a": 1}', b"null"])
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"plan\.json") as caught:
        read_json(Plan, path)
    assert "Remove it" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        read_json(Plan, tmp_path / "absent.json")


def test_writing_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_bytes(b"old", path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plain.os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_bytes(b"new", path)
    assert isinstance(caught.value, OSError) and "out=" in str(caught.value)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        write_bytes(b"new", tmp_path / "file" / "a")


def test_an_interrupt_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plain.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(b"new", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
