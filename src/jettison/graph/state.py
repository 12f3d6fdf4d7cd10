"""What must be as it was once the caller's network has run for us: its modes, its buffers, torch's own switches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the caller's modules in eval mode and afterwards each back as it was."""
    before = {m: m.training for m in model.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what the caller's `forward` writes into its own buffers (counters, caches)."""
    before = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer  # a forward may put another in its place
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within the block torch's fused transformer kernels are off: each would be one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
