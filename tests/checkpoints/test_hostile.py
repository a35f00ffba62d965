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
from lipfast.errors import CheckpointError, LipfastError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def file_of(path: Path) -> CheckpointFile:
    return find_checkpoints(path)[0]


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
    with pytest.raises(CheckpointError, match="bytes beside the weights; expected at most"):
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
    import torch._weights_only_unpickler
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
