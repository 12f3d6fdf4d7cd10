"""Networks by name: from code, from timm, from torchvision, or from a file of `torch.export`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, InputError, UnknownName
from jettison.sources.names import call_without_arguments, describe, find_object

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = "package.module:callable, timm:NAME, torchvision:NAME or FILE.pt2"
PRETRAINED = "@pretrained"
"""Behind a timm or torchvision name: take the library's own weights, which it may download."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network says of its training pictures: `(height, width)`, mean and std per channel of 0..1 pixels."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_model(source: str, *, weights: Path | None = None, device: str | torch.device | None = None) -> nn.Module:
    """Return the network that `source` names, with the weights of a file if one is given, in eval mode on `device`.

    `source` is `package.module:callable` (called without arguments, the current folder is importable), `timm:NAME`,
    `torchvision:NAME` (random weights unless `weights` is given or `@pretrained` follows the name) or `FILE.pt2`,
    which is a program like code is: take it only from people you trust.
    Raises InputError, UnknownName, CheckpointError, or NonFiniteError if a weight is NaN or infinite.
    """
    from jettison.sources.weights import check_finite, load_weights

    if source.startswith("timm:"):
        model = _build_timm(source.removeprefix("timm:"))
    elif source.startswith("torchvision:"):
        model = _build_torchvision(source.removeprefix("torchvision:"))
    elif source.endswith(".pt2"):
        model = _read_exported(Path(source))
    elif ":" in source:
        model = _build_from_code(source)
    else:
        raise InputError(f"{source!r} does not name a model. The command line and load_model take {FORMS}.")
    if weights is not None:
        load_weights(model, weights)
    check_finite(model, where=str(weights) if weights is not None else source)
    return _move(_freeze(model), device)


def read_preprocessing(model: nn.Module) -> Preprocessing | None:
    """Return the size, mean and std that a timm network carries, or None where the network says nothing."""
    settings = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, dict) or len(settings.get("input_size") or ()) != 3:
        return None
    _, height, width = settings["input_size"]
    return Preprocessing((height, width), tuple(settings["mean"]), tuple(settings["std"]))


def _build_from_code(source: str) -> nn.Module:
    from torch import nn

    found = find_object(source)
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    if not callable(found):
        raise InputError(
            f"{source!r} is a {type(found).__name__}, not a callable. Name a function that returns the network."
        )
    model = call_without_arguments(found, source)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source!r} returned a {type(model).__name__}, not a torch.nn.Module. Let it return the network itself."
        )
    return model


def _build_timm(name: str) -> nn.Module:
    timm = _import_extra("timm")
    name, pretrained = _split_pretrained(name)
    if name.split(".")[0] not in timm.list_models():
        raise UnknownName("timm model", name, timm.list_models())
    model: nn.Module = _build_extra(lambda: timm.create_model(name, pretrained=pretrained), f"timm:{name}", pretrained)
    return model


def _build_torchvision(name: str) -> nn.Module:
    models = _import_extra("torchvision").models
    name, pretrained = _split_pretrained(name)
    if name not in models.list_models():
        raise UnknownName("torchvision model", name, models.list_models())
    weights = "DEFAULT" if pretrained else None
    # Without this, a detection network downloads a backbone of its own.
    backbone = {"weights_backbone": None} if name.partition("_")[0] in _WITH_BACKBONE and not pretrained else {}
    model: nn.Module = _build_extra(
        lambda: models.get_model(name, weights=weights, **backbone), f"torchvision:{name}", pretrained
    )
    return model


_WITH_BACKBONE = frozenset(
    {"deeplabv3", "fasterrcnn", "fcn", "fcos", "keypointrcnn"}
    | {"lraspp", "maskrcnn", "retinanet", "ssd300", "ssdlite320"}
)


def _split_pretrained(name: str) -> tuple[str, bool]:
    return name.removesuffix(PRETRAINED), name.endswith(PRETRAINED)


def _import_extra(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise InputError(
                f"{package} is installed, but needs {error.name!r}, which is not. Run `pip install {error.name}`."
            ) from error
        raise InputError(
            f"{package} is not installed here, and the model is wanted from it. Run `pip install {package}`."
        ) from error
    except Exception as error:  # a torchvision built for another torch raises RuntimeError at import
        raise InputError(
            f"{package} is installed but does not import beside this torch: {describe(error)}. "
            f"Install the build that belongs to your torch (https://pytorch.org/get-started)."
        ) from error


def _build_extra(build: Callable[[], Any], source: str, pretrained: bool) -> Any:
    try:
        return build()
    except Exception as error:
        remedy = (
            "Its own weights could not be had; without a network, download them elsewhere and use --weights FILE."
            if pretrained
            else "Build it in a function of your own and name that as package.module:callable."
        )
        raise InputError(f"{source} could not be built: {describe(error)}. {remedy}") from error


def _read_exported(path: Path) -> nn.Module:
    import torch

    if not path.is_file():
        raise InputError(f"There is no file {path} in {Path.cwd()}. Give a file written by torch.export.save.")
    try:
        with _refuse_pickles():
            model = torch.export.load(path).module()
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as an exported network: {describe(error)}. "
            f"Write it anew with torch.export.save and this torch ({torch.__version__})."
        ) from error
    if training := sorted({str(n.target) for n in model.graph.nodes if _is_training(n)}):
        raise InputError(
            f"{path} was exported in training mode: it still runs {', '.join(training)} as in training. "
            f"Call model.eval() before torch.export.export, and save it anew."
        )
    return model


@contextmanager
def _refuse_pickles() -> Iterator[None]:
    """Keep torch.export.load from unpickling whatever a file brings: it falls back to `weights_only=False`."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_training(node: torch.fx.Node) -> bool:
    """Tell if a node of an exported program drops out, or takes its batch's statistics."""
    position = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}.get(str(node.target))
    return position is not None and len(node.args) > position and node.args[position] is True


def _freeze(model: nn.Module) -> nn.Module:
    try:
        return model.eval()
    except NotImplementedError:
        # Exported programs refuse .eval(): their mode was fixed when they were exported.
        return model


def _move(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    import torch

    try:
        return model.to(torch.device(device or "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {str(device)!r} cannot be used here: {describe(error)}. Use cpu, or leave --device out."
        ) from error
