"""What a training run must remember to go on bit for bit: weights, the optimizer's moments, losses, random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from jettison.core.errors import CheckpointError
from jettison.core.plain import write_bytes

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Memory:
    """What changes from step to step beside the parameters and the optimizer.

    `losses` has one number for each step done, `averages` the running mean of each parameter where one is kept,
    `kept` whatever the function called after each step keeps.
    """

    losses: list[float] = field(default_factory=list)
    averages: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


def save_state(student: nn.Module, optimizer: torch.optim.Optimizer, memory: Memory, path: Path) -> None:
    """Write the state of a run as safetensors, whole or not at all."""
    tensors = {"losses": torch.tensor(memory.losses, dtype=torch.float64), "random": torch.get_rng_state()}
    for name, parameter in student.named_parameters():
        tensors[f"parameter/{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    tensors |= {f"average/{name}": value for name, value in memory.averages.items()}
    tensors |= {f"kept/{name}": value for name, value in memory.kept.items()}
    write_bytes(save({name: value.cpu().contiguous() for name, value in tensors.items()}), path)


def load_state(student: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> tuple[Memory, Tensor]:
    """Put a saved state into student and optimizer; returns the memory and the random state, which the caller sets.

    Raises CheckpointError where the file is corrupt or belongs to another network.
    """
    tensors = _read(path)
    parameters = dict(student.named_parameters())
    named = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if named != set(parameters):
        other = sorted(named ^ set(parameters))[0]
        raise CheckpointError(f"{path} belongs to another training: {other!r} is in one of them only. Delete the file.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            stored = tensors[f"parameter/{name}"]
            if stored.shape != parameter.shape:
                raise CheckpointError(f"{path} belongs to another training: {name!r} has another shape. Delete it.")
            parameter.copy_(stored)
            moments = {m: tensors[f"{m}/{name}"] for m in MOMENTS if f"{m}/{name}" in tensors}
            # In the parameter's own memory layout, which the next convolution sees.
            optimizer.state[parameter] = {
                m: value if m == "step" else torch.empty_like(parameter).copy_(value) for m, value in moments.items()
            }
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    memory = Memory(tensors["losses"].tolist(), _part(tensors, "average/", device), _part(tensors, "kept/", device))
    return memory, tensors["random"]


def _part(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # Kernels round differently on memory that is not aligned as torch aligns its own.
        tensors = {name: value.clone() for name, value in load(path.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable training state: {error}. Delete the file.") from error
    if "losses" not in tensors or "random" not in tensors:
        raise CheckpointError(f"{path} is not a training state: it holds no losses. Delete the file.")
    return tensors
