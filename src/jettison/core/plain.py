"""Frozen dataclasses to JSON and back, strictly: an unknown or missing field is an error, never a default."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jettison.core.errors import CheckpointError, StorageError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turn a dataclass tree into dicts, lists, numbers and strings; paths become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")


def from_plain(kind: Any, data: Any, where: str = "") -> Any:
    """Build a value of type `kind` from plain data; raises CheckpointError naming the field that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return from_plain(inner, data, where)
    if origin is tuple and isinstance(data, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(from_plain(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(data))
        if len(arguments) == len(data):
            return tuple(
                from_plain(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, data, strict=True))
            )
    if origin is not None and issubclass(origin, Mapping) and isinstance(data, dict):
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(data, dict):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if names != set(data):
            raise CheckpointError(
                f"{where or kind.__name__} has fields {sorted(set(data) ^ names)} too many or too few."
            )
        return kind(**{k: from_plain(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in data.items()})
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and isinstance(data, kind) and isinstance(data, bool) == (kind is bool):
        return data
    raise CheckpointError(f"{where or 'The value'} should be {kind}, but is {data!r}.")


def write_json(value: Any, path: Path) -> None:
    """Write plain data as JSON, in one step: the file is whole or absent."""
    write_bytes((json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n").encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write to a temporary name beside `path`, flush to disk, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{path} could not be written: {error.strerror}. Free some space or choose another folder with out=."
        ) from error


def read_json(kind: type[T], path: Path) -> T:
    """Read a dataclass written by `write_json`; raises CheckpointError where the file is not one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Remove it to compute it anew.") from error
    try:
        result: T = from_plain(kind, data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no {kind.__name__}: {error} Remove it to compute it anew.") from error
    return result
