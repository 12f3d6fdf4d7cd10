"""Python objects by `package.module:name`, with the current folder importable."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jettison.core.errors import InputError, JettisonError, UnknownName


def find_object(source: str) -> Any:
    """Import `package.module:name` and return the object, dots in `name` followed.

    Raises InputError if the module cannot be imported and UnknownName if it holds no such name.
    """
    module_name, _, path = source.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise InputError(f"{source!r} is not of the form package.module:callable. Write for example nets.small:build.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except JettisonError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            remedy = f"Start from the folder that holds {module_name.split('.')[0]}, or install it."
        else:
            remedy = f"Install what {module_name} needs, for example with `pip install {missing}`."
        raise InputError(
            f"There is no module named {missing!r}. It was wanted for {source!r}, from the folder {folder}. {remedy}"
        ) from error
    except Exception as error:
        raise InputError(
            f"Importing {module_name!r} failed: {describe(error)}. The error is in that module, wanted for {source!r}. "
            f"Repair it; `python -c 'import {module_name}'` shows all of it."
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise UnknownName(f"object in {module_name}", name, (n for n in dir(found) if not n.startswith("_")))
        found = getattr(found, name)
    return found


def call_without_arguments(function: Callable[[], Any], source: str) -> Any:
    """Return `function()`; what it raises becomes an InputError that names `source`."""
    try:
        return function()
    except (JettisonError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(
            f"Calling {source!r} without arguments failed: {describe(error)}. The error is in that function. "
            f"Give a function that needs no arguments and returns what is asked for."
        ) from error


def describe(error: BaseException) -> str:
    """Return type and first line of an error's message, with the place it was raised at."""
    text = str(error).strip().splitlines()
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else ""
    return f"{type(error).__name__}: {text[0].rstrip('.') if text else 'no message'}{where}"
