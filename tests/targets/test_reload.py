"""A quantized network that was saved and reloaded gives every integer target the file it gave before."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tests.targets.networks import Pictures, Tokens

import jettison as jt
from jettison.targets import TARGETS
from jettison.testing.oracles import has_same_bits

pytestmark = pytest.mark.slow

INTEGER = [n for n in TARGETS if "int8" in importlib.import_module(f"jettison.targets.{n}").PRECISIONS]


@pytest.mark.parametrize("kind", [Pictures, Tokens], ids=["pictures", "tokens"])
@pytest.mark.parametrize("name", INTEGER)
def test_the_file_after_the_reload_is_the_file_before(
    name: str, kind: type[Pictures] | type[Tokens], tmp_path: Path
) -> None:
    target = importlib.import_module(f"jettison.targets.{name}")
    if (reason := target.why_missing()) is not None:
        pytest.skip(reason)
    x = torch.randn(4, *kind.shape)
    found = jt.quantize(kind().eval(), [x], target=name)
    again = jt.load_quantized(found.save(tmp_path / "saved"))
    files = [
        jt.export(q.module, x, tmp_path / f"{which}{target.SUFFIX}", target=name)
        for which, q in (("before", found), ("after", again))
    ]
    outputs = [target.predict(target.load(file, threads=1), (x,))[0] for file in files]
    assert has_same_bits(*outputs)
    # Some converters write times or addresses into their files; LiteRT's names tensors after the modules of a trace.
    if name != "litert":
        assert files[0].stat().st_size == files[1].stat().st_size
