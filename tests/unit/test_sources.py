"""Models, weights and inputs by name: every good form loads, every bad one ends in the error it should."""

from __future__ import annotations

import io
import logging
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jettison.core.errors import CalibrationError, CheckpointError, InputError, NonFiniteError, UnknownName
from jettison.sources.inputs import load_inputs, split_batch
from jettison.sources.limits import LATENCY, MACS, SIZE, make_input, read_limit, read_numbers, read_picture_size
from jettison.sources.models import load_model, read_preprocessing

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5))

ready = build()
number = 7

def broken():
    raise OSError("no such disk")

def other():
    return 3

def once():
    return (torch.zeros(2, 3) for _ in range(2))

def batches():
    return [(torch.full((4, 3), float(i)), torch.arange(4)) for i in range(3)]

def empty():
    return []

def named():
    return [{"ids": torch.zeros(4, 7), "mask": torch.ones(4, 7)}] * 2
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, of a name no other test uses."""
    name = f"sample_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5))


class TestModels:
    def test_callable_in_the_current_folder(self, code: str) -> None:
        model = load_model(f"{code}:build")
        assert not model.training
        assert not any(m.training for m in model.modules())
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)

    def test_a_module_is_copied_not_changed(self, code: str) -> None:
        model = load_model(f"{code}:ready")
        own = sys.modules[code].ready
        assert model is not own
        assert own.training

    @pytest.mark.parametrize(
        ("source", "kind", "says"),
        [
            ("resnet", InputError, "does not name a model"),
            ("no_such_package_9:build", InputError, "no module named 'no_such_package_9'"),
            ("{code}:biuld", UnknownName, "'build'"),
            ("{code}:broken", InputError, "no such disk"),
            ("{code}:other", InputError, "returned a int"),
            ("{code}:number", InputError, "not a callable"),
            ("{code}:a-b", InputError, "package.module:callable"),
            ("missing.pt2", InputError, "no file"),
        ],
    )
    def test_bad_sources(self, code: str, source: str, kind: type[Exception], says: str) -> None:
        with pytest.raises(kind, match=says):
            load_model(source.format(code=code))

    def test_a_module_that_fails_to_import(self, code: str, tmp_path: Path) -> None:
        (tmp_path / f"{code}_bad.py").write_text("import no_such_package_9\n")
        with pytest.raises(InputError, match="pip install no_such_package_9"):
            load_model(f"{code}_bad:build")
        (tmp_path / f"{code}_worse.py").write_text("1 / 0\n")
        with pytest.raises(InputError, match=r"ZeroDivisionError.*_worse\.py:1"):
            load_model(f"{code}_worse:build")

    def test_a_device_that_is_not_there(self, code: str) -> None:
        for device in ("cuda:77", "toaster"):
            with pytest.raises(InputError, match="cannot be used here"):
                load_model(f"{code}:build", device=device)

    def test_exported_file(self, tmp_path: Path) -> None:
        network, x = build().eval(), torch.randn(2, 3, 8, 8)
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(network, (x,)), path)
        assert torch.equal(load_model(str(path))(x), network(x))

    def test_exported_in_training_mode(self, tmp_path: Path) -> None:
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(build().train(), (torch.randn(2, 3, 8, 8),)), path)
        with pytest.raises(InputError, match="training mode"):
            load_model(str(path))

    def test_exported_file_that_is_corrupt(self, tmp_path: Path) -> None:
        path = tmp_path / "net.pt2"
        path.write_bytes(b"not a zip file")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(str(path))

    def test_a_pickle_in_an_exported_file_is_never_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        good, bad = tmp_path / "good.pt2", tmp_path / "bad.pt2"
        torch.export.save(torch.export.export(build().eval(), (torch.randn(2, 3, 8, 8),)), good)
        mark = tmp_path / "was_run"
        planted = io.BytesIO()
        torch.save(_Runs(mark), planted)
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as target:
            for name in source.namelist():
                is_sample = name.endswith("sample_inputs/model.pt")
                target.writestr(name, planted.getvalue() if is_sample else source.read(name))
        # The plant is live: torch alone would run it. (Its warning about that has a wrong format string.)
        monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
        with pytest.raises(AssertionError):
            torch.export.load(bad)
        assert mark.exists()
        mark.unlink()
        with pytest.raises(CheckpointError):
            load_model(str(bad))
        assert not mark.exists()

    def test_missing_extras_name_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for package in ("timm", "torchvision"):
            monkeypatch.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=f"pip install {package}"):
                load_model(f"{package}:resnet18")

    def test_timm_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def create_model(name: str, pretrained: bool) -> nn.Module:
            asked.append((name, pretrained))
            network = build()
            network.pretrained_cfg = {"input_size": (3, 64, 96), "mean": (0.5,) * 3, "std": (0.2,) * 3}
            return network

        fake = types.SimpleNamespace(list_models=lambda: ["resnet18", "vit_tiny"], create_model=create_model)
        monkeypatch.setitem(sys.modules, "timm", fake)
        settings = read_preprocessing(load_model("timm:resnet18"))
        assert settings is not None
        assert settings.size == (64, 96)
        load_model("timm:vit_tiny@pretrained")
        assert asked == [("resnet18", False), ("vit_tiny", True)]
        with pytest.raises(UnknownName, match="resnet18"):
            load_model("timm:resnet81")

    def test_a_plain_network_says_nothing_of_pictures(self) -> None:
        assert read_preprocessing(build()) is None


class _Runs:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


class TestWeights:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_files_load(self, code: str, tmp_path: Path, suffix: str, prefix: str) -> None:
        other, path = build().eval(), tmp_path / f"weights{suffix}"
        state = {prefix + k: v for k, v in other.state_dict().items()}
        if suffix == ".pt":
            torch.save({"epoch": 3, "state_dict": state}, path)
        else:
            save_file(state, path)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(load_model(f"{code}:build", weights=path)(x), other(x))

    def test_a_checkpoint_without_batch_norm_counters(self, code: str, tmp_path: Path) -> None:
        state = {k: v for k, v in build().state_dict().items() if "num_batches" not in k}
        save_file(state, tmp_path / "w.safetensors")
        load_model(f"{code}:build", weights=tmp_path / "w.safetensors")

    def test_tied_weights_may_be_stored_once(self, code: str, tmp_path: Path) -> None:
        (tmp_path / f"{code}_tied.py").write_text(
            "from torch import nn\n\ndef build():\n    a, b = nn.Linear(4, 4, False), nn.Linear(4, 4, False)\n"
            "    b.weight = a.weight\n    return nn.Sequential(a, b)\n"
        )
        save_file({"0.weight": torch.eye(4)}, tmp_path / "w.safetensors")
        model = load_model(f"{code}_tied:build", weights=tmp_path / "w.safetensors")
        assert torch.equal(model(torch.eye(4)), torch.eye(4))
        save_file({"0.weight": torch.eye(5)}, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match="another shape"):
            load_model(f"{code}_tied:build", weights=tmp_path / "w.safetensors")

    def test_a_foreign_file_lists_what_does_not_fit(self, code: str, tmp_path: Path) -> None:
        state = build().state_dict()
        state["head.weight"] = state.pop("0.weight")
        state["4.bias"] = torch.zeros(9)
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load_model(f"{code}:build", weights=tmp_path / "w.safetensors")
        message = str(caught.value)
        assert "1 missing (0.weight)" in message
        assert "1 unexpected (head.weight)" in message
        assert "4.bias (9,) instead of (5,)" in message

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_corrupt_and_absent_files(self, code: str, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match="no file"):
            load_model(f"{code}:build", weights=tmp_path / name)
        (tmp_path / name).write_bytes(b"\x00garbage" * 9)
        with pytest.raises(CheckpointError, match="corrupt"):
            load_model(f"{code}:build", weights=tmp_path / name)
        whole = io.BytesIO()
        torch.save(build().state_dict(), whole)
        (tmp_path / name).write_bytes(whole.getvalue()[:900])
        with pytest.raises(CheckpointError):
            load_model(f"{code}:build", weights=tmp_path / name)

    def test_pickled_code_is_never_run(self, code: str, tmp_path: Path) -> None:
        mark = tmp_path / "was_run"
        torch.save({"0.weight": _Runs(mark)}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="never unpickles"):
            load_model(f"{code}:build", weights=tmp_path / "w.pt")
        (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Runs(mark)))
        with pytest.raises(CheckpointError):
            load_model(f"{code}:build", weights=tmp_path / "raw.pt")
        assert not mark.exists()

    def test_no_state_dict_in_the_file(self, code: str, tmp_path: Path) -> None:
        for content in ({"epoch": 3}, [1, 2], {}):
            torch.save(content, tmp_path / "w.pt")
            with pytest.raises(CheckpointError, match="state dict"):
                load_model(f"{code}:build", weights=tmp_path / "w.pt")

    @pytest.mark.parametrize("name", ["4.weight", "1.running_var"])
    def test_nan_names_the_tensor(self, code: str, tmp_path: Path, name: str) -> None:
        state = build().state_dict()
        state[name].view(-1)[1] = float("nan")
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(NonFiniteError, match=f"1 of .*'{name}'"):
            load_model(f"{code}:build", weights=tmp_path / "w.safetensors")


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, (height, width) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)


class TestPictures:
    def test_classes_are_sorted_sub_folders(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, {f"{c}/deep/{i}.png": (20, 30) for c in ("dog", "cat") for i in range(5)})
        batches = load_inputs(str(tmp_path), batch=4, size=(8, 8))
        items = list(batches)
        assert [tuple(x.shape) for x, _ in items] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
        assert torch.cat([y for _, y in items]).sum() == 5
        for place, file in enumerate(batches.files):
            assert batches.labels[place] == ["cat", "dog"].index(file.parts[-3])
        for (x, y), (x2, y2) in zip(items, batches, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)

    def test_shuffled_by_seed_and_limited(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, {f"{c}/{i}.png": (8, 8) for c in "ab" for i in range(20)})
        first = load_inputs(str(tmp_path), limit=20, seed=1)
        assert first.files == load_inputs(str(tmp_path), limit=20, seed=1).files
        assert first.files != load_inputs(str(tmp_path), limit=20, seed=2).files
        assert len(first.files) == 20
        assert 0 < sum(first.labels) < 20

    def test_no_classes_without_two_folders(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, {"a/1.png": (8, 8), "a/2.png": (8, 8)})
        assert isinstance(next(iter(load_inputs(str(tmp_path)))), torch.Tensor)
        write_pictures(tmp_path, {"b/1.png": (8, 8), "top.png": (8, 8)})
        assert isinstance(next(iter(load_inputs(str(tmp_path)))), torch.Tensor)

    def test_pixels(self, tmp_path: Path) -> None:
        from PIL import Image

        pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        (plain,) = load_inputs(str(tmp_path))
        assert torch.equal(plain[0], expected)
        (cropped,) = load_inputs(str(tmp_path), size=(6, 4))
        assert torch.equal(cropped[0], expected[:, :, 3:7])
        (scaled,) = load_inputs(str(tmp_path), mean=(0.1, 0.2, 0.3), std=(0.5,))
        mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(scaled[0], (expected - mean) / 0.5, rtol=0, atol=1e-6)  # float32 rounding
        (grey,) = load_inputs(str(tmp_path), grey=True)
        assert grey.shape == (1, 1, 6, 10)

    @pytest.mark.parametrize("size", [(8, 8), (8, 20), (31, 7), (64, 64)])
    def test_any_size_is_covered(self, tmp_path: Path, size: tuple[int, int]) -> None:
        write_pictures(tmp_path, {"wide.png": (9, 33), "tall.png": (40, 11), "one.png": (1, 1)})
        (x,) = load_inputs(str(tmp_path), size=size)
        assert x.shape == (3, 3, *size)

    def test_bad_folders(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="no pictures"):
            load_inputs(str(tmp_path))
        write_pictures(tmp_path, {"a.png": (8, 8), "b.png": (8, 9)})
        with pytest.raises(InputError, match="--size-px"):
            list(load_inputs(str(tmp_path)))
        (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
        with pytest.raises(InputError, match=r"c\.png cannot be decoded"):
            list(load_inputs(str(tmp_path), size=(8, 8)))

    def test_bad_settings(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, {"a.png": (8, 8)})
        for options in ({"mean": (0.1, 0.2)}, {"std": (0.0,)}, {"size": (0, 8)}, {"batch": 0}, {"limit": 0}):
            with pytest.raises(InputError):
                load_inputs(str(tmp_path), **options)

    def test_without_pillow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(InputError, match=r"pip install 'jettison\[images\]'"):
            load_inputs(str(tmp_path))


class TestArrays:
    def test_forms(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        x, ids = np.random.default_rng(0).normal(size=(7, 3)), np.arange(14).reshape(7, 2)
        np.savez(path, x)
        batches = load_inputs(str(path), batch=4)
        assert [len(b) for b in batches] == [4, 3] == [len(b) for b in batches]
        assert next(iter(batches)).dtype == torch.float32
        np.savez(path, x=x, y=np.arange(7, dtype=np.uint8))
        inputs, labels = split_batch(next(iter(load_inputs(str(path)))), 1)
        assert labels is not None
        assert labels.dtype == torch.int64
        assert len(inputs) == 1
        np.savez(path, x0=x, x1=ids, y=np.arange(7))
        inputs, labels = split_batch(next(iter(load_inputs(str(path)))), 2)
        assert [i.dtype for i in inputs] == [torch.float32, torch.int64]
        assert labels is not None

    def test_limit_keeps_rows_together(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.arange(100.0)[:, None], y=np.arange(100))
        ((x, y),) = load_inputs(str(tmp_path / "a.npz"), batch=50, limit=10)
        assert len(x) == 10
        assert torch.equal(x[:, 0].long(), y)
        assert y.max() > 10  # drawn from all rows, not the first ones

    @pytest.mark.parametrize(
        ("arrays", "kind", "says"),
        [
            ({"x": np.zeros((0, 3))}, CalibrationError, "no items"),
            ({"x": np.zeros((4, 3)), "y": np.zeros(3)}, InputError, "different lengths"),
            ({"x": np.zeros(())}, InputError, "different lengths"),
            ({"images": np.zeros((4, 3))}, InputError, "holds the arrays images"),
            ({"x": np.zeros((4, 3)), "z": np.zeros(4)}, InputError, "holds the arrays x, z"),
            ({"x": np.array(["a", "b"])}, InputError, "dtype"),
            ({"x": np.array([[1.0], [np.nan], [np.inf]])}, NonFiniteError, "2 values of x .* first in item 1"),
            ({"x": np.array([{}, {}], dtype=object)}, InputError, "Python objects"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, np.ndarray], kind: type[Exception], says: str) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(kind, match=says):
            load_inputs(str(tmp_path / "a.npz"))

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no file"):
            load_inputs(str(tmp_path / "a.npz"))
        (tmp_path / "a.npz").write_bytes(b"PK garbage")
        with pytest.raises(InputError, match="cannot be read"):
            load_inputs(str(tmp_path / "a.npz"))
        (tmp_path / "a.csv").write_text("1,2")
        with pytest.raises(InputError, match="file of another kind"):
            load_inputs(str(tmp_path / "a.csv"))
        with pytest.raises(InputError, match="nothing that exists"):
            load_inputs("nowhere")
        with pytest.raises(InputError, match="folders of pictures"):
            load_inputs(str(tmp_path / "a.npz"), mean=(0.5,))


class TestCallables:
    def test_batches_and_limit(self, code: str) -> None:
        assert len(load_inputs(f"{code}:batches")) == 3
        limited = load_inputs(f"{code}:batches", limit=6)
        for _ in range(2):
            assert [len(x) for x, _ in limited] == [4, 2]
        (last,) = list(load_inputs(f"{code}:named", limit=3))
        assert {k: len(v) for k, v in last.items()} == {"ids": 3, "mask": 3}

    @pytest.mark.parametrize(
        ("name", "kind", "says"),
        [
            ("empty", CalibrationError, "no batches"),
            ("once", InputError, "only once"),
            ("other", InputError, "not batches"),
            ("broken", InputError, "no such disk"),
        ],
    )
    def test_bad_callables(self, code: str, name: str, kind: type[Exception], says: str) -> None:
        with pytest.raises(kind, match=says):
            load_inputs(f"{code}:{name}")

    def test_batches_that_cannot_be_split(self) -> None:
        for item in (3, "ab", (), (torch.zeros(2), 3), {"x": torch.zeros(2)}):
            with pytest.raises(InputError, match="cannot be split"):
                split_batch(item, 1)


class TestLimits:
    @pytest.mark.parametrize(
        ("text", "dimension", "field", "value"),
        [
            ("0.5", LATENCY, "latency", 0.5),
            ("1", SIZE, "size", 1.0),
            ("25%", MACS, "macs", 0.25),
            ("4ms", LATENCY, "latency_ms", 4.0),
            ("500 us", LATENCY, "latency_ms", 0.5),
            ("2MB", SIZE, "size_mb", 2.0),
            ("500kB", SIZE, "size_mb", 0.5),
            ("1MiB", SIZE, "size_mb", 1.048576),
            ("30M", MACS, "mmacs", 30.0),
            ("1.5G", MACS, "mmacs", 1500.0),
            ("3e-1", LATENCY, "latency", 0.3),
        ],
    )
    def test_good(self, text: str, dimension: object, field: str, value: float) -> None:
        assert read_limit(text, dimension) == (field, pytest.approx(value, rel=1e-12))

    @pytest.mark.parametrize(
        "text", ["4", "0", "-0.5", "1.01", "150%", "0%", "4kg", "ms", "", "nan", "inf", "-4ms", "0ms"]
    )
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(InputError, match="4ms"):
            read_limit(text, LATENCY)

    def test_numbers_and_sizes(self) -> None:
        assert read_numbers("0.1,2") == (0.1, 2.0)
        assert read_picture_size("224") == (224, 224)
        assert read_picture_size("256,192") == (256, 192)
        for text in ("1,2,3", "0", "a", "-3", "2.5"):
            with pytest.raises(InputError):
                read_picture_size(text)
        for text in ("", "1,,2", "nan"):
            with pytest.raises(InputError):
                read_numbers(text)

    def test_inputs_from_shapes(self) -> None:
        assert make_input("1,3,4").shape == (1, 3, 4)
        assert torch.equal(make_input("2,2"), make_input("2,2"))
        assert make_input("1,5:int64").dtype == torch.int64
        for text in ("1,3,a", "0,3", "1,3:cat", "1,3:nn"):
            with pytest.raises(InputError):
                make_input(text)


def test_doctor_tells_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from jettison.sources import doctor

    diagnosis = doctor.diagnose()
    assert diagnosis.torch == torch.__version__
    assert (diagnosis.torch_build == "CPU") == (torch.version.cuda is None)
    assert diagnosis.machine.cores >= 1
    found = {t.name: t for t in diagnosis.targets}
    assert set(found) == {"eager", "onnxruntime", "openvino", "executorch", "litert", "inductor"}
    for target in diagnosis.targets:
        assert target.usable != bool(target.reason)
    text = doctor.describe_diagnosis(diagnosis)
    assert all(name in text for name in found)

    monkeypatch.setattr(doctor, "read_version", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = doctor.diagnose()
    assert not any(t.usable for t in bare.targets)
    assert all("pip install" in t.remedy or "apt-get" in t.remedy for t in bare.targets)


@pytest.mark.parametrize(("build", "works"), [("cpu", True), ("cu130", False)])
def test_torchvision_for_another_processor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, works: bool
) -> None:
    from jettison.sources import doctor

    for package, version in (("torch", "2.13.0+cpu"), ("torchvision", f"0.28.0+{build}")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = None\n")
    found = {p: types.SimpleNamespace(origin=str(tmp_path / p / "__init__.py")) for p in ("torch", "torchvision")}
    monkeypatch.setattr(doctor, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(doctor, "read_version", lambda name: "1.0")
    diagnosis = doctor.diagnose()
    assert {p.name: not p.problem for p in diagnosis.packages if p.name in ("timm", "torchvision")} == {
        "timm": works,
        "torchvision": works,
    }
    assert ("whl/cpu" in doctor.describe_diagnosis(diagnosis)) == (not works)


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from jettison.sources import doctor

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (inductor,) = (t for t in doctor.diagnose().targets if t.name == "inductor")
    assert not inductor.usable
    assert "C++ compiler" in inductor.reason
