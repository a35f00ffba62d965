"""What training scripts save beside the weights: numbers of numpy, settings, whole objects."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import pathlib
import pickle
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.checkpoints.pickles import as_key
from lipfast.errors import CheckpointError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


class Mode(enum.Enum):
    FAST = 1


class Settings:
    """An own class, as training scripts have."""

    def __init__(self, **values) -> None:
        self.__dict__.update(values)


class OwnDict(dict):
    """An own kind of dict, as EasyDict is."""


class Slotted:
    __slots__ = ("width",)

    def __init__(self) -> None:
        self.width = 3


def read(path, *, legacy=False, content=None, protocol=2):
    if content is not None:
        options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
        torch.save(content, path, **options)
    (file,) = find_checkpoints(path)
    return read_checkpoint(file)


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


LAYERS = nn.Linear(3, 2)
OPTIMIZER = torch.optim.Adam(LAYERS.parameters())

BESIDE = [
    ("best", np.float64(0.25), 0.25),
    ("lr", np.float32(0.5), 0.5),
    ("step", np.int64(30), 30),
    ("width", np.uint8(200), 200),
    ("best", np.bool_(True), True),
    ("name", np.str_("w\u00e9"), "w\u00e9"),
    ("half", np.float16(1.5), 1.5),
    ("big", np.dtype(">f8").type(2.0), 2.0),
    ("day", np.datetime64("2024-05-01"), None),
    ("z", np.complex128(1j), None),
    ("when", datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
    ("day", datetime.date(2024, 5, 1), "2024-05-01"),
    ("aware", datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc), None),
    ("took", datetime.timedelta(seconds=3), None),
    ("where", pathlib.Path("/data/x.csv"), "/data/x.csv"),
    ("where", pathlib.PureWindowsPath("a/b"), "a/b"),
    ("losses", np.arange(5.0), None),
    ("rng", np.random.RandomState(0), None),
    ("rng", np.random.default_rng(0), None),
    ("rng", np.random.get_state(), None),
    ("words", np.array(["a", None], dtype=object), None),
    ("words", np.array(["a", "b"]), None),
    ("history", [np.float64(0.1)], None),
    ("d", collections.defaultdict(list, a=[1]), None),
    ("c", collections.Counter(a=2), None),
    ("o", collections.OrderedDict(a=2), None),
    ("q", collections.deque([1], maxlen=3), None),
    ("s", {1, 2}, None),
    ("f", frozenset({1}), None),
    ("z", 1 + 2j, None),
    ("b", b"xx", None),
    ("b", bytearray(b"xx"), None),
    ("r", range(3), None),
    ("s", slice(1, 2), None),
    ("e", ValueError("x"), None),
    ("mode", Mode.FAST, None),
    ("kind", Settings, None),
    ("function", functools.partial(torch.relu), None),
    ("method", "text".upper, None),
    ("loss", nn.MSELoss(), None),
    ("optimizer", OPTIMIZER, None),
    ("schedule", torch.optim.lr_scheduler.StepLR(OPTIMIZER, 1), None),
    ("slots", Slotted(), None),
    ("own", OwnDict(a=1), None),
    ("ns", types.SimpleNamespace(a=1), None),
    ("generator", torch.Generator().get_state(), None),
    ("device", torch.device("cpu"), None),
    ("dtype", torch.float16, None),
    ("size", torch.Size([1, 2]), None),
    ("layout", torch.strided, None),
    ("sparse", torch.eye(2).to_sparse(), None),
    ("meta", torch.empty(2, device="meta"), None),
]


@pytest.mark.parametrize(("legacy", "protocol"), [(False, 2), (True, 2), (False, 4), (False, 5)])
def test_whatever_lies_beside_the_weights(tmp_path, legacy, protocol):
    for number, (key, value, _) in enumerate(BESIDE):
        content = {"state_dict": STATE, key: value}
        options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
        torch.save(content, tmp_path / f"{number:02}.pt", **options)
    found = [read_checkpoint(file) for file in find_checkpoints(tmp_path)]
    for checkpoint, (key, value, expected) in zip(found, BESIDE, strict=True):
        assert_same(checkpoint.state_dict, STATE)
        known = checkpoint.metadata.values
        assert known == ({} if expected is None else {key: expected}), (key, value, known)


@pytest.mark.parametrize(
    "settings",
    [
        argparse.Namespace(lr=0.5, width=6, layers=[1, 2], inner=argparse.Namespace(a=1)),
        types.SimpleNamespace(lr=np.float64(0.5), width=6),
        Settings(lr=0.5, width=6),
        OwnDict(lr=0.5, width=6),
        collections.defaultdict(int, lr=0.5, width=6),
    ],
    ids=["Namespace", "SimpleNamespace", "own class", "own dict", "defaultdict"],
)
def test_settings_of_any_class_are_metadata(tmp_path, settings):
    content = {"model": STATE, "args": settings, "epoch": np.int64(7)}
    checkpoint = read(tmp_path / "a.pth", content=content)
    assert_same(checkpoint.state_dict, STATE)
    assert checkpoint.metadata.values == {"lr": 0.5, "width": 6, "epoch": 7}
    assert checkpoint.metadata.epoch == 7


class DictConfig:
    """Pickled as OmegaConf's, which is not installed."""

    def __init__(self, **values) -> None:
        self.__dict__.update(_parent=None, _metadata=Settings())
        self._content = {key: AnyNode(value) for key, value in values.items()}


class AnyNode:
    def __init__(self, value: object) -> None:
        self._val = value
        self._parent = None


def test_configurations_like_those_of_omegaconf(tmp_path):
    content = {"state_dict": STATE, "hyper_parameters": DictConfig(width=6, act="relu")}
    assert read(tmp_path / "a.ckpt", content=content).metadata.values == {"width": 6, "act": "relu"}


# Arrays of numpy as weights


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_arrays_are_weights(tmp_path, kind, protocol):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "by_column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f4"),
        "half": np.ones(3, np.float16),
        "count": np.array(3, np.int64),
        "none": np.zeros((0, 2), np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
    }
    path = tmp_path / "a.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(arrays, protocol))
    else:
        zipped = kind == "torch"
        torch.save(arrays, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    native = {k: torch.from_numpy(v.astype(v.dtype.newbyteorder("="))) for k, v in arrays.items()}
    assert_same(read(path).state_dict, native)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_state_dict_in_a_plain_pickle(tmp_path, protocol):
    state = {**STATE, "shared": STATE["0.weight"][1]}
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"model": state, "epoch": 3}, protocol))
    checkpoint = read(tmp_path / "a.pt")
    assert_same(checkpoint.state_dict, state)
    assert checkpoint.metadata.epoch == 3


# Tensors of all kinds

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16),
    *(torch.float8_e4m3fn, torch.complex128),
]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_tensors_arrive_as_they_were(tmp_path, legacy, large):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(600 if large else 6, 600, generator=generator)
    state = {str(kind): base[:3, :5].to(kind) for kind in DTYPES}
    state |= {
        "base": base,
        "view": base[2:, 1::3],
        "transposed": base.t(),
        "expanded": base[:1].expand(4, -1),
        "scalar": base[0, 0],
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(3, dtype=torch.uint8),
        "behind": torch.arange(4.0).double(),
        "parameter": nn.Parameter(base[0]),
        "buffer": nn.Buffer(base[1]),
    }
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    found = read(path).state_dict
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride()
        assert found[name].data_ptr() % tensor.dtype.itemsize == 0
        assert found[name].to(torch.complex128).equal(tensor.to(torch.complex128))
    same = found["base"].untyped_storage().data_ptr() == found["view"].untyped_storage().data_ptr()
    assert same


def test_weights_do_not_change_the_file(tmp_path):
    state = {"weight": torch.zeros(600, 600)}
    checkpoint = read(tmp_path / "a.pt", content=state)
    before = (tmp_path / "a.pt").read_bytes()
    checkpoint.state_dict["weight"] += 1
    assert (tmp_path / "a.pt").read_bytes() == before


def test_numbers_of_the_other_byte_order(tmp_path):
    state = {
        "a": torch.arange(3.0),
        "z": torch.tensor([1 + 2j]),
        "b": torch.tensor([1], dtype=torch.int8),
    }
    stream = io.BytesIO()
    torch.save(state, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("byteorder"):
                data = b"big"
            elif "/data/" in entry.filename:
                width = 1 if len(data) < 4 else 4
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            new.writestr(entry.filename, data)
    assert_same(read(tmp_path / "a.pt").state_dict, state)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "a sparse tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantized"),
        (lambda: torch.empty(2, device="meta"), "a tensor on the device 'meta'"),
        (lambda: torch.tensor([1j]).conj().imag, "a tensor that is negated"),
        (lambda: (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), None), "a quant"),
    ],
)
def test_tensors_that_are_not_read_are_named(tmp_path, make, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words on sparse and quantized tensors
        torch.save({**STATE, "1.weight": make()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: '1\.weight' is {kind}.*does not read"):
        read(tmp_path / "a.pt")


# Whole modules


def models() -> dict[str, nn.Module]:
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    tied.append(tied[0])
    passing = nn.Linear(3, 3)
    passing.register_buffer("kept", torch.ones(1))
    passing.register_buffer("passing", torch.ones(1), persistent=False)
    passing.register_parameter("none", None)
    nested = nn.ModuleDict({"a": nn.ModuleList([nn.BatchNorm1d(3), nn.Conv2d(1, 2, 3)])})
    return {
        "tied": tied,
        "passing": passing,
        "nested": nested,
        "weight_norm": nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
        "attention": nn.TransformerEncoderLayer(4, 2, 8),
        "parallel": nn.DataParallel(nn.Linear(3, 3)),
        "recurrent": nn.LSTM(3, 3),
    }


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("wrapped", [False, True])
def test_whole_modules_give_their_state_dict(tmp_path, name, wrapped):
    torch.manual_seed(0)
    model = models()[name]
    content = {"model": model, "epoch": 3} if wrapped else model
    try:
        checkpoint = read(tmp_path / "a.pt", content=content)
    except RuntimeError:  # parametrized modules are not pickled
        assert name == "weight_norm"
        return
    assert_same(checkpoint.state_dict, {k: v.detach() for k, v in model.state_dict().items()})
    assert checkpoint.metadata.values == ({"epoch": 3} if wrapped else {})


def test_a_whole_compiled_module_is_the_module_in_it(tmp_path):
    checkpoint = read(tmp_path / "a.pt", content={"net": torch.compile(LAYERS), "epoch": 3})
    assert_same(checkpoint.state_dict, {k: v.detach() for k, v in LAYERS.state_dict().items()})


def test_torchscript_gives_its_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 3))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(model).save(str(tmp_path / "a.pt"))
        torch.jit.trace(model, torch.zeros(2, 4)).save(str(tmp_path / "b.pt"))
    expected = {k: v.detach() for k, v in model.state_dict().items()}
    for name in ("a.pt", "b.pt"):
        assert_same(
            dict(sorted(read(tmp_path / name).state_dict.items())), dict(sorted(expected.items()))
        )


def test_an_object_that_is_no_module_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.pt: holds \S*Settings; expected a state"):
        read(tmp_path / "a.pt", content=Settings(weight=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"a\.pt: holds the state of an optimizer"):
        read(tmp_path / "a.pt", content=OPTIMIZER)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read(tmp_path / "a.pt", content=nn.MSELoss())


def test_keys_that_are_slow_to_hash_are_replaced():
    assert as_key(("a", 1)) == ("a", 1)
    assert as_key(1 << 80) != 1 << 80
    assert as_key(((), ())) != ((), ())
