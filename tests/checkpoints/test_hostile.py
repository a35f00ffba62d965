"""Files made to do harm: an error each, no code run, memory bounded."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lipfast.checkpoints import CheckpointFile, find_checkpoints, read_checkpoint
from lipfast.errors import CheckpointError, LipfastError, NotWeightsError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def file_of(path: Path) -> CheckpointFile:
    return find_checkpoints(path)[0]


def assert_refused_in_little_memory(path: Path, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(file_of(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def safetensors_of(header: object, data: bytes = b"\0" * 24) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        safetensors_of({"w": tensor(0, 1 << 60, [1 << 58])}),
        safetensors_of({"w": tensor(0, 24, [1 << 58])}),
        safetensors_of({"w": tensor(0, 24, [-6])}),
        safetensors_of({"w": tensor(0, 16, [4]), "v": tensor(8, 24, [4])}),
        safetensors_of({"w": tensor(0, 16, [4]), "v": tensor(0, 16, [4])}),
        safetensors_of({"w": tensor(16, 0, [4])}),
        safetensors_of({"w": tensor(100, 116, [4])}),
        safetensors_of({"w": tensor(0, 24, [6], "F99")}),
        safetensors_of({"w": tensor(0, 24, [1 << 40, 0, 1 << 40])}),
    ],
    ids=[
        "header of 2^60 bytes",
        "header of 2^64 - 1 bytes",
        "tensor of 2^60 bytes",
        "shape of 2^58",
        "negative shape",
        "overlap",
        "the same bytes twice",
        "end before start",
        "behind the end",
        "unknown dtype",
        "overflowing shape",
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_safetensors_headers_that_lie(tmp_path, content, large):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content + (b"\0" * (2 << 20) if large else b""))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated, or not"):
        read_checkpoint(file_of(path))


def repacked(state: object, change) -> bytes:
    """A file of torch.save whose zip entries went through `change(name, data)`."""
    stream = io.BytesIO()
    torch.save(state, stream)
    packed = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            name, data, method = change(entry.filename, old.read(entry))
            new.writestr(name, data, method)
    return packed.getvalue()


def test_a_compressed_torch_file_is_refused(tmp_path):
    def bomb(name: str, data: bytes):
        return name, data + b"\0" * (50 << 20 if "data/0" in name else 0), zipfile.ZIP_DEFLATED

    (tmp_path / "a.pt").write_bytes(repacked(STATE, bomb))
    with pytest.raises(CheckpointError, match=r"a\.pt: its entries are compressed or overlap"):
        read_checkpoint(file_of(tmp_path / "a.pt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_byte_arrays_of_any_size_are_refused(tmp_path, legacy):
    call = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R."  # bytearray(2^44)

    def change(name: str, data: bytes):
        return name, call if name.endswith("data.pkl") else data, zipfile.ZIP_STORED

    if legacy:
        parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]
        (tmp_path / "a.pt").write_bytes(b"".join(parts) + call + pickle.dumps([], 2))
    else:
        (tmp_path / "a.pt").write_bytes(repacked(STATE, change))
    with pytest.raises(CheckpointError, match="byte arrays, which are no weights"):
        read_checkpoint(file_of(tmp_path / "a.pt"))


def test_a_pickle_of_millions_of_objects_is_refused(tmp_path):
    def change(name: str, data: bytes):
        flood = b"\x80\x02" + b"}" * (9 << 20) + b"."
        return name, flood if name.endswith("data.pkl") else data, zipfile.ZIP_STORED

    (tmp_path / "a.pt").write_bytes(repacked(STATE, change))
    with pytest.raises(CheckpointError, match="more than 2000000 operations"):
        read_checkpoint(file_of(tmp_path / "a.pt"))
    (tmp_path / "b.pt").write_bytes(b"\x80\x02" + b"}" * (3 << 20) + b".")
    with pytest.raises(CheckpointError, match="more than 2000000 operations"):
        read_checkpoint(file_of(tmp_path / "b.pt"))


def test_dicts_that_hold_themselves(tmp_path):
    loop: dict = {"epoch": 1}
    loop["config"] = loop
    level: dict = {"deep": 1}
    for _ in range(40):  # six to the power of forty paths
        level = dict.fromkeys(("config", "args", "hparams", "metadata", "metrics"), level)
    torch.save({"state_dict": STATE, "config": loop, "args": level}, tmp_path / "a.pt")
    assert read_checkpoint(file_of(tmp_path / "a.pt")).metadata.values == {"epoch": 1}
    nested: dict = {}
    nested["model"] = nested
    torch.save(nested, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(file_of(tmp_path / "b.pt"))


def test_names_that_are_no_text(tmp_path):
    deep: tuple = ()
    for _ in range(18):
        deep = (deep, deep)
    torch.save({**STATE, deep: torch.ones(1), 3: torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_checkpoint(file_of(tmp_path / "a.pt")).state_dict) == list(STATE)


def test_a_tensor_that_claims_more_than_there_is_stays_a_view(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_checkpoint(file_of(tmp_path / "a.pt")).state_dict["w"].shape == (1 << 40,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


# Pickles: programs that nothing may run


def pickled(folder: Path, program: bytes, *, kind: str = "zip") -> Path:
    """A file of torch.save whose pickle is the program."""
    path = folder / "a.pt"
    if kind == "zip":

        def change(name: str, data: bytes):
            return name, program if name.endswith("data.pkl") else data, zipfile.ZIP_STORED

        path.write_bytes(repacked(STATE, change))
    elif kind == "legacy":
        parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join(parts) + program + pickle.dumps([], 2))
    else:
        path.write_bytes(program)
    return path


KINDS = pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
WEIGHT = (  # an array of numpy: {"w": array([1.0])}
    b"X\1\0\0\0wcnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
    b"(K\1K\1\x85cnumpy\ndtype\nX\2\0\0\0f8\x89\x88\x87R(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff"
    b"\xff\xffK\0tb\x89C\x08\0\0\0\0\0\0\xf0?tbs"
)


def beside_a_weight(value: bytes) -> bytes:
    """A dict of one weight, and of whatever leaves one value on the stack."""
    return b"\x80\x02}" + WEIGHT + b"X\1\0\0\0x" + value + b"s."


TRAP = """
import pathlib
proof = pathlib.Path(__file__).with_name("proof")
proof.touch()
"""

CALLS = {
    "REDUCE": b"c%b\n%b\n(X\4\0\0\0textt\x52",
    "NEWOBJ": b"c%b\n%b\n(X\4\0\0\0textt\x81",
    "NEWOBJ_EX": b"c%b\n%b\n(X\4\0\0\0textt}\x92",
    "INST": b"(X\4\0\0\0texti%b\n%b\n",
    "OBJ": b"(c%b\n%b\nX\4\0\0\0texto",
    "STACK_GLOBAL": b"V%b\nV%b\n\x93(X\4\0\0\0textt\x52",
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "nt.system", "subprocess.Popen", "sys.exit"),
        *("__builtin__.eval", "builtins.exec", "builtins.__import__", "builtins.open"),
        *("runpy.run_path", "shutil.rmtree", "importlib.import_module", "pickle.loads"),
    ],
)
def test_calls_that_attacks_make_are_named(tmp_path, how, name):
    module, _, function = name.encode().rpartition(b".")
    path = pickled(tmp_path, beside_a_weight(CALLS[how] % (module, function)))
    shown = re.escape(name.replace("__builtin__", "builtins"))
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*more than weights \({shown}\); nothing"):
        read_checkpoint(file_of(path))


@KINDS
@pytest.mark.parametrize("how", CALLS)
def test_nothing_is_imported_or_called(tmp_path, monkeypatch, kind, how):
    (tmp_path / "trap_of_a_pickle.py").write_text(TRAP)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = pickled(tmp_path, beside_a_weight(CALLS[how] % (b"trap_of_a_pickle", b"x")), kind=kind)
    assert read_checkpoint(file_of(path)).state_dict["w"].tolist() == [1.0]
    assert "trap_of_a_pickle" not in sys.modules
    assert not (tmp_path / "proof").exists()


GETATTR = b"c__builtin__\ngetattr\n(cos\npath\nX\6\0\0\0systemtR"

INERT = {
    "getattr": GETATTR,
    "what getattr gives, called": GETATTR + b"(X\4\0\0\0true\x74R",
    "a call of a call of a call": b"ca\nb\n)R)R)R)R",
    "a call of a text": b"X\1\0\0\0a)R",
    "calls as arguments": b"ca\nb\n(ca\nb\n)RtR",
    "a state that is a call": b"ca\nb\n)Rca\nc\n)Rb",
    "a state for a name": b"ca\nb\n}X\1\0\0\0xK\1sb",
    "a state for a dict": b"}}X\5\0\0\0itemsK\1sb",
    "a state for a list": b"]N}X\6\0\0\0appendK\1s\x86b",
    "states over and over": b"ca\nb\n)R" + b"}b" * 10_000,
    "__class__ and __hash__": b"ca\nb\n)R}(X\x09\0\0\0__class__ca\nb\nX\x08\0\0\0__hash__N" + b"ub",
    "items for a call": b"ca\nb\n)RK\1K\2s",
    "an append to a call": b"ca\nb\n)RK\1a",
    "an append to a text": b"X\1\0\0\0aK\1a",
    "a call as a key": b"}ca\nb\n)RK\1s",
    "a list as a key": b"}]K\1s",
    "itself as a key": b"}q\0h\0K\1s",
    "a deep tuple as a key": b"})" + b"\x85" * 200_000 + b"K\1s",
    "a tuple of tuples as a key": b"})" + b"q\1h\1\x86" * 80 + b"K\1s",
    "a deep tuple in a set": b"\x8f()" + b"\x85" * 200_000 + b"\x90",
    "a deep list": b"]" * 200_000 + b"a" * 199_999,
    "deep calls": b"ca\nb\nq\0" + b")R" * 200_000,
    "a deep state": b"ca\nb\nq\0)R" + b"h\0)R" * 100_000 + b"b" * 100_000,
    "a list in itself": b"]q\0h\0a",
    "a call in its own state": b"ca\nb\n)Rq\0}X\1\0\0\0xh\0sb",
    "one hash for all": b"}("
    + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(20_000))
    + b"u",
    "dicts of dicts": b"}q\0" + b"0}X\1\0\0\0ah\0sX\1\0\0\0bh\0sq\0" * 100,
    "a number of two": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nX\2\0\0\0f8\x85RC\1xtR",
    "a dtype that is no text": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n)\x85\x85RC\1xtR",
    "a path of no text": b"cpathlib\nPosixPath\n(K\1tR",
    "a date of no bytes": b"cdatetime\ndatetime\n(M\xff\xff)\x85tR",
    "a counter of a text": b"ccollections\nCounter\n(X\1\0\0\0atR",
}


@KINDS
@pytest.mark.parametrize("program", INERT.values(), ids=INERT)
def test_what_lies_beside_the_weights_stays_inert(tmp_path, kind, program):
    checkpoint = read_checkpoint(file_of(pickled(tmp_path, beside_a_weight(program), kind=kind)))
    assert checkpoint.state_dict["w"].tolist() == [1.0]
    assert set(checkpoint.state_dict) == {"w"}
    checkpoint.metadata.to_json()


TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%bX\3\0\0\0cpu%btQ"
HUGE = b"\x8a\x07" + (1 << 50).to_bytes(7, "little")

OUT_OF_PROPORTION = {
    "one text encoded over and over": b"c_codecs\nencode\nq\0"
    + TEXT
    + b"\x85q\1"
    + b"h\0h\1R" * 50_000,
    "one array over and over": (
        b"cnumpy.core.numeric\n_frombuffer\nq\0(B"
        + struct.pack("<I", 1 << 20)
        + b"a" * (1 << 20)
        + b"cnumpy\ndtype\nX\2\0\0\0u1\x85RJ\0\0\x10\0\x85tq\1"
        + b"h\0h\1R" * 50_000
    ),
    "one list into dicts over and over": (
        b"ccollections\nOrderedDict\nq\0]("
        + b"K\1K\1\x86" * 50_000
        + b"e\x85q\1"
        + b"h\0h\1R" * 50_000
    ),
    "many arguments over and over": b"ca\nb\nq\0(" + b"N" * 100_000 + b"tq\1" + b"h\0h\1R" * 50_000,
    "dicts without end": b"}" * 2_100_000,
    "an array of bytes": b"c__builtin__\nbytearray\n" + HUGE + b"\x85R",
}


@KINDS
@pytest.mark.parametrize("program", OUT_OF_PROPORTION.values(), ids=OUT_OF_PROPORTION)
def test_pickles_out_of_proportion_are_refused(tmp_path, kind, program):
    path = pickled(tmp_path, beside_a_weight(program), kind=kind)
    assert_refused_in_little_memory(path, r"over and over|operations|byte arrays")


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (b"ctorch._utils\n_rebuild_sparse_tensor\n(NNtR", "a sparse tensor"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nca\nb\n)NtR", "a b"),
    ],
)
def test_tensors_that_would_be_made_by_calls(tmp_path, program, kind):
    path = pickled(tmp_path, beside_a_weight(program))
    with pytest.raises(CheckpointError, match=rf"a\.pt: 'x' is {kind}, which lipfast does"):
        read_checkpoint(file_of(path))


def test_tensors_without_number_are_refused(tmp_path):
    view = (
        b"ctorch._utils\n_rebuild_tensor\nq\0("
        + STORAGE % (b"0", b"K\6")
        + b"K\0K\1\x85K\1\x85tq\1"
    )
    path = pickled(tmp_path, beside_a_weight(view + b"h\0h\1R" * 110_000))
    with pytest.raises(CheckpointError, match="more than 100000 tensors"):
        read_checkpoint(file_of(path))


def module_of(children: bytes) -> bytes:
    return b"ca\nM\n)R}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}(" + children + b"uub"


def test_modules_that_hold_one_another(tmp_path):
    chain = module_of(b"")
    for _ in range(40):
        chain += b"q\0" + module_of(b"X\1\0\0\0ah\0X\1\0\0\0bh\0")
    itself = b"ca\nM\n)Rq\0}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}X\1\0\0\0ah\0sub"
    for program in (chain, itself):
        for whole in (b"\x80\x02" + program + b".", beside_a_weight(program)):
            path = pickled(tmp_path, whole)
            with pytest.raises(CheckpointError, match="modules hold one another without end"):
                read_checkpoint(file_of(path))


LIES = {
    "a frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 1 << 60),
    "bytes of 2^60": b"\x8e" + struct.pack("<Q", 1 << 60),
    "bytes of 2^31": b"B" + struct.pack("<I", 1 << 31),
    "an array of bytes of 2^60": b"\x96" + struct.pack("<Q", 1 << 60),
    "text of 2^60": b"\x8d" + struct.pack("<Q", 1 << 60),
    "an integer of 2^31 bytes": b"\x8b" + struct.pack("<i", (1 << 31) - 1),
    "an integer of less than nothing": b"\x8b" + struct.pack("<i", -5),
    "an integer of many digits": b"I" + b"9" * 100_000 + b"\n",
    "a place that was never filled": b"j\xff\xff\xff\x7f",
    "a place beyond all": b"Np" + b"9" * 40 + b"\n",
    "no mark": b"t",
    "nothing to take": b"00000",
    "an odd dict": b"(Nd",
    "no operation": b"\xff",
    "an extension": b"\x82\1",
    "a buffer of elsewhere": b"\x97",
    "a name that is no text": b"NN\x93",
    "arguments that are no tuple": b"ca\nb\nNR",
    "no arguments of a name": b"(o",
    "a storage that is not there": STORAGE % (b"7", b"K\1"),
    "a storage elsewhere": STORAGE.replace(b"X\1\0\0\0", b"X\x09\0\0\0") % (b"../../../", b"K\1"),
    "a storage of more than its bytes": STORAGE % (b"0", HUGE),
    "a storage of less than nothing": STORAGE % (b"0", b"J\xff\xff\xff\xff"),
    "a storage of no count": STORAGE % (b"0", b"N"),
    "a storage of an unknown type": (STORAGE % (b"0", b"K\6")).replace(b"Float", b"Xloat"),
    "a storage with a deep key": b"(X\7\0\0\0storagectorch\nFloatStorage\n)"
    + b"\x85" * 200_000
    + b"NK\1tQ",
    "a storage that is a text": b"Pstorage\n",
    "an identity of nothing": b")Q",
    "a tensor of no storage": b"ctorch._utils\n_rebuild_tensor\n(NK\0K\1\x85K\1\x85tR",
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("program", LIES.values(), ids=LIES)
def test_pickles_that_lie_are_refused(tmp_path, kind, program):
    path = pickled(tmp_path, beside_a_weight(program), kind=kind)
    assert_refused_in_little_memory(path, r"a\.pt: truncated, or not weights saved by")


@pytest.mark.parametrize(
    "arguments",
    [
        b"K\0K\7\x85K\1\x85",  # seven of six
        b"K\1K\6\x85K\1\x85",
        b"J\xff\xff\xff\xffK\1\x85K\1\x85",
        b"K\0K\2\x85J\xff\xff\xff\xff\x85",
        b"K\0J\xff\xff\xff\xff\x85K\1\x85",
        b"K\0" + HUGE + HUGE + b"\x86K\0K\0\x86",
        b"K\0K\2\x85" + HUGE + b"\x85",
        HUGE + b"K\1\x85K\1\x85",
        b"K\0K\2\x85K\1K\1\x86",
        b"K\0X\1\0\0\0aM\xff\xff\x86K\1K\1\x86",
        b"K\0G?\xf0\0\0\0\0\0\0\x85K\1\x85",
        b"NK\1\x85K\1\x85",
        b"K\0NN",
        b"K\0(" + b"K\1" * 100 + b"t(" + b"K\1" * 100 + b"t",
    ],
)
def test_tensors_that_leave_their_storage(tmp_path, arguments):
    make = b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE % (b"0", b"K\6") + arguments + b"tR"
    path = pickled(tmp_path, beside_a_weight(make))
    with pytest.raises(CheckpointError, match=r"a\.pt: truncated, or not weights saved by"):
        read_checkpoint(file_of(path))


@pytest.mark.parametrize("large", [False, True])
def test_entries_that_lie_about_their_place(tmp_path, large):
    state = {"w": torch.ones(600_000 if large else 6)}
    torch.save(state, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.rindex(b"a/data/0") - 46  # its header in the directory: 46 bytes before the name
    data[at + 42 : at + 46] = struct.pack("<I", len(data) - 8)
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt: truncated, or not weights saved by"):
        read_checkpoint(file_of(tmp_path / "a.pt"))


# Fuzzing: whatever the bytes, an answer or a LipfastError

FUZZ = settings(max_examples=150)


def read_bytes_as(name: str, data: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    try:
        checkpoint = read_checkpoint(file_of(path))
    except LipfastError as error:
        assert name in str(error)
    else:
        assert all(isinstance(key, str) for key in checkpoint.state_dict)
        checkpoint.metadata.to_json()


HEADERS = st.dictionaries(
    st.text(max_size=6) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"]),
            "shape": st.lists(st.integers(-2, 1 << 62), max_size=4),
            "data_offsets": st.lists(st.integers(-8, 1 << 62), max_size=3),
        }
    )
    | st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(), max_size=3),
    max_size=4,
)


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=64), lie=st.none() | st.integers(0, 2**64 - 1))
def test_fuzzed_safetensors_headers(tmp_path, header, data, lie):
    content = safetensors_of(header, data)
    if lie is not None:
        content = struct.pack("<Q", lie) + content[8:]
    read_bytes_as("a.safetensors", content, tmp_path)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6)


def edited(good: bytes, edits: list[tuple[float, bytes]], keep: float) -> bytes:
    data = bytearray(good)
    for where, content in edits:
        at = int(where * len(data))
        data[at : at + len(content)] = content
    return bytes(data[: int(keep * len(data))])


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy"])
@FUZZ
@given(edits=EDITS, keep=st.floats(0.2, 1) | st.just(1.0))
def test_fuzzed_bytes_of_good_files(tmp_path, kind, edits, keep):
    stream = io.BytesIO()
    if kind == "safetensors":
        stream.write(save(STATE, {"step": "1"}))
    else:
        content = {"state_dict": STATE, "epoch": 1, "config": {"width": 3}}
        torch.save(content, stream, _use_new_zipfile_serialization=kind == "pt")
    name = "a.safetensors" if kind == "safetensors" else "a.pt"
    read_bytes_as(name, edited(stream.getvalue(), edits, keep), tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(index=JSON, sidecar=JSON, places=st.dictionaries(st.text(max_size=5), st.text(max_size=12)))
def test_fuzzed_indexes_and_sidecars(tmp_path, index, sidecar, places):
    save_file(STATE, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "metadata.json").write_text(json.dumps(sidecar))
    for content in (index, {"weight_map": places, "metadata": index}):
        read_bytes_as("model.safetensors.index.json", json.dumps(content).encode(), tmp_path)
    read_bytes_as("a.safetensors", save(STATE), tmp_path)


ATHERIS = """
import sys, pathlib
import atheris
with atheris.instrument_imports(include=["lipfast.checkpoints", "zipfile", "pickletools"]):
    from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.errors import LipfastError

folder = pathlib.Path(sys.argv[1])
ENDINGS = (".safetensors", ".pt", ".safetensors.index.json", ".jsonl", ".csv")

def once(data):
    if not data:
        return
    ending = ENDINGS[data[0] % len(ENDINGS)]
    path = folder / f"a{ending}"
    path.write_bytes(data[1:])
    try:
        for file in find_checkpoints(path):
            read_checkpoint(file).metadata.to_json()
    except LipfastError:
        pass
    finally:
        path.unlink()

arguments = [sys.argv[0], sys.argv[2], "-runs=120000", "-rss_limit_mb=3000", "-max_len=4096",
             "-seed=1", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
atheris.Setup(arguments, once)
atheris.Fuzz()
"""


@pytest.mark.long
def test_a_coverage_guided_campaign(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    corpus, work = tmp_path / "corpus", tmp_path / "work"
    corpus.mkdir()
    work.mkdir()
    stream, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": STATE, "epoch": 1}, stream)
    torch.save(STATE, legacy, _use_new_zipfile_serialization=False)
    seeds = [
        b"\0" + save(STATE, {"step": "1"}),
        b"\1" + stream.getvalue(),
        b"\1" + legacy.getvalue(),
        b"\2" + b'{"weight_map": {"w": "a-00001-of-00001.safetensors"}}',
        b"\3" + b'{"path": "a.pt", "run": 1}\n',
        b"\4" + b"path,run\na.pt,1\n",
    ]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    command = [sys.executable, "-c", ATHERIS, str(work), str(corpus)]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3000)
    assert process.returncode == 0, process.stderr[-3000:]
    executed = re.search(r"number_of_executed_units:\s*(\d+)", process.stderr)
    assert executed is not None and int(executed[1]) >= 120_000


W = {"weight": torch.ones(2)}


def in_dicts(depth: int) -> dict:
    content: dict = W
    for level in range(depth):
        content = {f"k{level}": content}
    return content


def test_networks_lie_deep_and_what_holds_itself_has_each_weight_once(tmp_path):
    torch.save(in_dicts(40), tmp_path / "a.pt")
    assert list(read_checkpoint(file_of(tmp_path / "a.pt")).state_dict) == ["weight"]
    itself: dict = {"model": dict(W), "parts": []}
    itself |= {"me": itself, "again": itself}
    itself["parts"] += [itself["parts"], itself]
    torch.save(itself, tmp_path / "b.pt")
    assert list(read_checkpoint(file_of(tmp_path / "b.pt")).tensors) == ["model.weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"m.0": W, "m": {"0": W}}, r"two weights in it are called 'm\.0\.weight'"),
        ({"m": [W], "m.0": W}, r"two weights in it are called 'm\.0\.weight'"),
        ({"_orig_mod.weight": W["weight"], **W}, "two weights in it are called 'weight'"),
        ({"a" * 2_000_000: {f"{i}": torch.ones(1) for i in range(500)}}, "has 20000.. characters"),
        ({".a" * 40_000: W["weight"], **W}, "has 80000 characters"),
    ],
)
def test_names_that_tell_no_weights_apart_or_never_end(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    assert_refused_in_little_memory(tmp_path / "a.pt", rf"a\.pt: .*{message}; nothing in it was")
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        path = tmp_path / "b.safetensors"
        save_file({name: value.clone() for name, value in content.items()}, path)
        assert_refused_in_little_memory(path, rf"b\.safetensors: .*{message}; nothing in it was")


def test_lists_in_lists_without_weights_are_not_searched_over_and_over(tmp_path):
    nested: list = []
    for _ in range(60):
        nested = [nested] * 4
    torch.save(nested, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: holds a list; expected a state dict"):
        read_checkpoint(file_of(tmp_path / "a.pt"))
    torch.save([nested, {"param_groups": []}], tmp_path / "b.pt")
    with pytest.raises(NotWeightsError):
        read_checkpoint(file_of(tmp_path / "b.pt"))
    weights: dict = W
    for _ in range(60):
        weights = {"a": weights, "b": weights}
    torch.save(weights, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: nested beyond what weights are"):
        read_checkpoint(file_of(tmp_path / "c.pt"))
