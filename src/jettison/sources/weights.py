"""Weights from a file into a network: safetensors, or a state dict that torch reads with `weights_only=True`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, NonFiniteError
from jettison.sources.names import describe

if TYPE_CHECKING:
    from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
SHOWN = 4
"""How many names of each kind an error lists."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into `model`, in place; every tensor must fit.

    Raises CheckpointError with the first missing, unexpected and mis-shaped names, or if the file cannot be read.
    """
    state = read_state(path)
    _compare(model, state, path)
    model.load_state_dict(dict(state), strict=False)  # _compare was strict, but knows tied and derived tensors


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a `.safetensors`, `.pt` or `.pth` file, without wrappers and prefixes."""
    import torch

    if not path.is_file():
        raise CheckpointError(f"There is no file of weights at {path}. Give the path of a .safetensors or .pt file.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt, or holds Python objects beside tensors, which jettison never unpickles. "
            f"Save the tensors alone: torch.save(model.state_dict(), path), or safetensors.torch.save_file."
        ) from error
    except Exception as error:  # zip, header and JSON errors have no common type
        raise CheckpointError(
            f"{path} cannot be read: {describe(error)}. It is corrupt or no file of weights; fetch or save it anew."
        ) from error
    return _unwrap(content, path)


def check_finite(model: nn.Module, *, where: str) -> None:
    """Raise NonFiniteError naming the first parameter or buffer of `model` that holds NaN or infinity.

    Buffers may hold infinity on purpose (attention masks), so for them only NaN is refused.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            bad = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()
            if count := int(bad.sum()):
                raise NonFiniteError(
                    f"{count} of {tensor.numel()} values of {kind} {name!r} are NaN or infinite. "
                    f"They come from {where}. Take a checkpoint from before training diverged."
                )


def _unwrap(content: Any, path: Path) -> Mapping[str, Tensor]:
    import torch

    for _ in range(2):  # Lightning and timm wrap once, some scripts twice
        for key in WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict. Save model.state_dict() there.")
    if not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        names = ", ".join(map(repr, list(content)[:SHOWN])) or "nothing"
        raise CheckpointError(f"{path} holds no state dict, but {names}. Save model.state_dict() there.")
    state: dict[str, Tensor] = {str(k): v for k, v in content.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): v for name, v in state.items()}
    return state


def _compare(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    tied = {_place(t) for name, t in own.items() if name in state}
    # Old checkpoints have no BatchNorm counters, and safetensors keeps one of several tied tensors.
    missing = [
        name
        for name, tensor in own.items()
        if name not in state and not name.endswith("num_batches_tracked") and _place(tensor) not in tied
    ]
    unexpected = [name for name in state if name not in own]
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [_list("missing", missing), _list("unexpected", unexpected), _list("of another shape", misshaped)]
    if any(faults):
        raise CheckpointError(
            f"{path} does not fit the network: {'; '.join(f for f in faults if f)}. "
            f"The network has {len(own)} tensors, the file {len(state)}. Build the network the file was saved from."
        )


def _place(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    # An empty tensor has no address; its own id keeps it apart from other empty ones.
    return tensor.data_ptr() or id(tensor), int(tensor.storage_offset()), tuple(tensor.shape)


def _list(kind: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
