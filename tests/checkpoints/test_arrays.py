import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]
W = np.arange(12, dtype=np.float32).reshape(3, 4)


class Exports:
    """What JAX's arrays are to us: no NumPy array, no tensor, but exporting its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class Converts:
    """What a Keras variable is to us: it can only be made a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array


class ConvertsAfterAll(Converts):
    """What an array on several devices is to us: ``__dlpack__`` is there and does not work."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("lies on two devices")

    def __dlpack_device__(self) -> Any:
        return 1, 0


class OnlyFails:
    __dlpack__ = ConvertsAfterAll.__dlpack__
    __dlpack_device__ = ConvertsAfterAll.__dlpack_device__


@pytest.mark.parametrize(
    "wrap",
    [torch.from_numpy, np.asarray, Converts, ConvertsAfterAll, lambda w: Exports(torch.from_numpy(w))],
    ids=["torch", "numpy", "array", "array after dlpack", "dlpack"],
)
def test_any_array_is_read_without_a_copy(wrap: Callable[[np.ndarray], Any]) -> None:
    found = open_checkpoint({"w": wrap(W)})
    assert found.info("w").dtype == "F32"
    assert found.info("w").shape == (3, 4)
    assert found["w"].data_ptr() == W.ctypes.data
    assert found.read("w", (1, 3), (2, 4)).tolist() == W[1:3, 2:4].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8])
def test_dlpack_keeps_dtypes(dtype: torch.dtype, same: Same) -> None:
    w = torch.arange(6).to(dtype)
    assert same(open_checkpoint({"w": Exports(w)})["w"], w)


def test_tensors_of_every_dtype_come_back(tensors: dict[str, torch.Tensor], same: Same) -> None:
    found = open_checkpoint(tensors)
    assert list(found) == list(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_ml_dtypes_become_the_same_bits(same: Same) -> None:
    """How JAX's arrays of these dtypes look as NumPy arrays."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with JAX, which is no dependency")
    values = torch.tensor([0.5, -1.5, 3.0, 448.0])
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        array = values.numpy().astype(getattr(ml_dtypes, name))
        assert same(open_checkpoint({"w": array})["w"], values.to(getattr(torch, name)))
    with pytest.raises(CheckpointError, match="has no counterpart"):
        open_checkpoint({"w": values.numpy().astype(ml_dtypes.float8_e4m3)})


def test_nested_parameters_are_flattened_with_dots() -> None:
    params = {"params": OrderedDict(layer={"kernel": W, 0: W + 1}), "norm.scale": W[0]}
    found = open_checkpoint(params)
    assert list(found) == ["params.layer.kernel", "params.layer.0", "norm.scale"]
    assert found["params.layer.0"].tolist() == (W + 1).tolist()


@pytest.mark.parametrize(
    "array",
    [
        W[::-1, ::-2],
        W.T,
        np.asfortranarray(W),
        W.astype(">f4"),
        np.lib.stride_tricks.as_strided(W, (3, 4), (0, 4), writeable=False),
        np.zeros(5, [("tag", "u1"), ("w", "f4")])["w"],
        np.broadcast_to(np.float64(3), ()),
        np.zeros((0, 4)),
        np.float32(2.5) * np.ones(()),
    ],
    ids=["backwards", "transposed", "by columns", "big-endian", "strided", "field", "scalar", "empty", "0-d"],
)
def test_awkward_layouts_are_read_as_they_are_meant(array: np.ndarray) -> None:
    found = open_checkpoint({"w": array})
    assert found["w"].tolist() == array.tolist()
    if array.size > 1:
        assert found.read("w", (1, 3)).tolist() == array[1:3].tolist()
    plain = array.astype(array.dtype.newbyteorder("="), order="C")
    assert found.digest("w") == open_checkpoint({"w": plain}).digest("w")


def test_a_read_only_array_is_converted_in_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """``jax.device_get`` gives read-only arrays, of which torch wants a copy: of what is read, not of all."""
    w = np.ones((1000, 10))
    w.flags.writeable = False
    seen = []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: seen.append(a.nbytes) or from_numpy(a))
    open_checkpoint({"w": w}).read("w", (3, 5))
    assert max(seen) == 2 * 10 * 8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "got list"),
        (None, "got NoneType"),
        ("text", "got str"),
        (1.5, "got float"),
        (OnlyFails(), "lies on two devices"),
        (np.array([object()]), "dtype object has no counterpart"),
        (np.array(["a"]), "has no counterpart"),
        (np.zeros(2, "m8[s]"), "has no counterpart"),
        (np.zeros(2, np.complex128), "unknown dtype torch.complex128"),
        (torch.zeros(2, device="meta"), "holds no plain entries"),
        (torch.eye(3).to_sparse(), "holds no plain entries"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_array_is_refused(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint({"ok": W, "layer": {"bad": value}})
    assert "'layer.bad'" in str(caught.value)


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"two values are called 'a\.b'"):
        open_checkpoint({"a": {"b": W}, "a.b": W})


def test_an_empty_mapping_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint({})


def test_shared_memory_is_recognised_as_tied() -> None:
    w = torch.ones(4, 4)
    found = open_checkpoint({"embed": w, "head": w.view(4, 4), "t": w.T, "part": w[:2], "copy": w.clone()})
    assert found.tied == {"head": "embed"}
    assert open_checkpoint({"a": W, "b": W[:], "c": W.copy(), "d": W.view(np.int32)}).tied == {"b": "a"}


def test_tensors_without_memory_are_not_tied() -> None:
    assert open_checkpoint({"a": torch.zeros(0), "b": torch.zeros(0)}).tied == {}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "tiny"})

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 1}


def test_a_module_is_its_state() -> None:
    module = Model()
    found = open_checkpoint(module)
    assert list(found) == ["steps", "embed.weight", "head.weight"]
    assert found.config == {"model_type": "tiny"}
    assert found.tied == {"head.weight": "embed.weight"}
    assert not found["embed.weight"].requires_grad
    assert found["embed.weight"].data_ptr() == module.embed.weight.data_ptr()


def test_a_module_without_configuration() -> None:
    assert open_checkpoint(torch.nn.Linear(2, 3)).config == {}


def test_a_checkpoint_is_returned_as_it_is() -> None:
    found = open_checkpoint({"w": W})
    assert open_checkpoint(found) is found


def test_memory_stays_readable_after_closing() -> None:
    with open_checkpoint({"w": W}) as found:
        pass
    assert found["w"].tolist() == W.tolist()


def test_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", **{"a/b": W, "half": W.astype(np.float16), "n": np.arange(3)})
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    with open_checkpoint(tmp_path / "x.npz") as found:
        assert {name: found.info(name).dtype for name in found} == {"a/b": "F32", "half": "F16", "n": "I64"}
        assert found["a/b"].tolist() == W.tolist()
        assert found.reference == str(tmp_path / "x.npz")
        assert found.config == {"model_type": "tiny"}


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("kind", ["code", "truncated", "no archive", "one array"])
def test_a_bad_npz_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.npz"
    np.savez(path, w=np.array([Bomb()], object) if kind == "code" else W)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "no archive":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, W)
    with pytest.raises(CheckpointError, match=r"cannot read .*bad\.npz.*Save it with numpy\.savez"):
        open_checkpoint(path)
    assert not Path("exploded").exists()


def test_of_an_archive_only_headers_are_read_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.ones((3, 4)), b=np.zeros(5, np.float16))
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("read at once"))
        found = open_checkpoint(tmp_path / "x.npz")
    assert (found.info("a").shape, found.info("b").dtype) == ((3, 4), "F16")
    assert found.read("a", (1, 2)).tolist() == [[1.0] * 4]


class Coded(torch.Tensor):
    """A tensor that stands for codes and a scale, as torchao's do."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> "Coded":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class Readable(Coded):
    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scale


def test_tensors_that_stand_for_codes_are_read_as_numbers_and_are_not_tied() -> None:
    one, two = (torch.arange(i, i + 6, dtype=torch.int8).reshape(2, 3) for i in (0, 6))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2, bias=False), "b": torch.nn.Linear(3, 2, bias=False)})
    for name, codes in (("a", one), ("b", two)):
        model[name].weight = torch.nn.Parameter(Readable(codes, torch.tensor(0.5)), requires_grad=False)
    with open_checkpoint(model) as found:
        assert not found.tied
        assert torch.equal(found["a.weight"], one * 0.5)
        assert torch.equal(found.read("b.weight", (1, 2)), two[1:] * 0.5)


def test_tensors_that_hide_their_entries_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Coded hides its entries"):
        open_checkpoint({"w": Coded(torch.ones(2, 3, dtype=torch.int8), torch.tensor(1.0))})


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_model_that_one_process_has_distributed_is_read() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with open_checkpoint(model) as found:
        assert not found.tied
        assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_tensor_on_several_processes_is_refused() -> None:
    class Mesh:
        def size(self) -> int:
            return 4

    class Distributed(torch.Tensor):
        device_mesh = Mesh()

        def to_local(self) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(CheckpointError, match=r"over 4 processes \(DTensor\)\. Gather"):
        open_checkpoint({"w": torch.ones(2, 3).as_subclass(Distributed)})
