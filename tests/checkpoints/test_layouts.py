"""Folders of torch.distributed.checkpoint, DeepSpeed and Megatron; a run as its own folder."""

from __future__ import annotations

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.checkpoints.names import is_state_file
from lipfast.errors import ArchiveError, CheckpointError, NotWeightsError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def same(one: dict[str, Tensor], other: dict[str, Tensor] = STATE) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in other)


def read(archive: Any, **options: Any):
    return read_checkpoint(*find_checkpoints(archive), **options)


# torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore")
def distributed(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    dcp.save(content, checkpoint_id=str(folder))
    return folder


def adam() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", [(), ("model",), ("state", "net", "state_dict")])
def test_a_distributed_checkpoint(tmp_path, keys):
    content: dict[str, Any] = dict(STATE)
    for key in reversed(keys):
        content = {key: content}
    if keys:
        content |= {"optimizer": adam(), "epoch": 3, "lr": 0.5}
    folder = distributed(tmp_path / "run" / "step_10", content)
    (file,) = find_checkpoints(tmp_path)
    assert file.uri == f"file://{folder}/.metadata"
    assert file.size == sum(path.stat().st_size for path in folder.iterdir())
    checkpoint = read_checkpoint(file)
    assert same(checkpoint.state_dict)
    assert (checkpoint.metadata.run, checkpoint.metadata.step) == ("run", 10)
    if keys:
        assert (checkpoint.metadata.epoch, checkpoint.metadata.values["lr"]) == (3, 0.5)
    for named in (folder, folder / "__0_0.distcp", folder / ".metadata", str(folder / "*.distcp")):
        assert find_checkpoints(named)[0].uri == file.uri


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_elsewhere_and_of_other_dtypes(tmp_path):
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "n": torch.arange(4), "s": torch.tensor(2.0)}
    folder = distributed(tmp_path / "d", {"model": state, "ema": {"a": torch.zeros(3)}})
    torch.save({"epoch": 3}, folder / "meta.pt")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/lipfast-dcp/{path.name}", path.read_bytes())
    try:
        for archive in ("memory://lipfast-dcp", "memory://lipfast-dcp/__0_0.distcp", folder):
            assert same(read(archive).state_dict, state)
            assert read(archive).metadata.epoch == 3
            assert same(read(archive, prefix="ema").state_dict, {"a": torch.zeros(3)})
    finally:
        memory.rm("/lipfast-dcp", recursive=True)


@pytest.mark.filterwarnings("ignore")
def test_what_trainers_write_beside_the_slices(tmp_path):
    folder = distributed(tmp_path / "epoch=3-step=7.ckpt", {"model": STATE})
    torch.save(
        {"epoch": 3, "global_step": 70, "hyper_parameters": {"width": 4}}, folder / "meta.pt"
    )
    (file,) = find_checkpoints(tmp_path)
    metadata = read_checkpoint(file).metadata
    assert (metadata.step, metadata.values["global_step"], metadata.values["width"]) == (7, 70, 4)


def sliced(
    folder: Path, size: list[int], slices: list[tuple[list[int], Tensor]], **change: Any
) -> Path:
    """One tensor 'w' in slices of two files, as several ranks write them."""
    folder.mkdir()
    storage, chunks = {}, []
    ends = {"__0_0.distcp": 0, "__1_0.distcp": 0}
    for number, (offset, part) in enumerate(slices):
        stream = io.BytesIO()
        torch.save(part, stream)
        name = f"__{number % 2}_0.distcp"
        with (folder / name).open("ab") as file:
            file.write(stream.getvalue())
        length = len(stream.getvalue())
        place = {"relative_path": name, "offset": ends[name], "length": length, **change}
        storage[MetadataIndex("w", offset)] = _StorageInfo(**place)
        chunks.append(ChunkStorageMetadata(torch.Size(offset), part.shape))
        ends[name] += length
    entry = TensorStorageMetadata(TensorProperties(), torch.Size(size), chunks)
    index = Metadata({"w": entry}, {"w": ("w",)}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_slices_of_several_ranks_are_put_together(tmp_path):
    w = torch.arange(35.0).reshape(5, 7)
    parts = [([a, b], w[a : a + 2, b : b + 4].clone()) for a in range(0, 5, 2) for b in (0, 4)]
    assert same(read(sliced(tmp_path / "d", [5, 7], parts)).state_dict, {"w": w})


@pytest.mark.parametrize(
    ("size", "offsets", "change", "message"),
    [
        ([4, 2], [[0, 0], [3, 0]], {}, "outside of shape"),
        ([6, 2], [[0, 0], [2, 0]], {}, "missing, or overlap"),
        ([4, 2], [[0, 0]], {}, "missing, or overlap"),
        ([4], [[0, 0], [2, 0]], {}, "no part of shape"),
        ([1 << 40, 2], [[0, 0], [2, 0]], {}, "larger than all files"),
        ([4, 2], [[0, 0], [2, 0]], {"relative_path": "../secret.distcp"}, "no file beside it"),
        ([4, 2], [[0, 0], [2, 0]], {"relative_path": "/etc/passwd"}, "no file beside it"),
        ([4, 2], [[0, 0], [2, 0]], {"relative_path": "__7_0.distcp"}, "'__7_0.distcp' is missing"),
        ([4, 2], [[0, 0], [2, 0]], {"length": 1 << 50}, "slices are longer than"),
        ([4, 2], [[0, 0], [2, 0]], {"length": -1}, "no place of a slice"),
        ([4, 2], [[0, 0], [2, 0]], {"offset": 1 << 20}, "is truncated"),
        ([4, 2], [[0, 0], [2, 0]], {"offset": 5}, "not weights saved by torch|truncated"),
        ([4, 2], [[0, 0], [2, 0]], {"transform_descriptors": ["zstd"]}, "was transformed"),
    ],
)
def test_indexes_that_lie(tmp_path, size, offsets, change, message):
    folder = sliced(tmp_path / "d", size, [(at, torch.ones(2, 2)) for at in offsets], **change)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("where", ["alone", "beside", "slice"])
def test_hostile_indexes_stay_inert(tmp_path, where):
    proof = tmp_path / "proof"
    folder = sliced(tmp_path / "d", [2, 2], [([0, 0], torch.ones(2, 2))])
    if where == "slice":
        data = pickle.dumps(Evil(str(proof)))
        (folder / "__0_0.distcp").write_bytes(data.ljust((folder / "__0_0.distcp").stat().st_size))
    else:
        content: Any = Evil(str(proof))
        if where == "beside":
            content = pickle.loads((folder / ".metadata").read_bytes())
            content.storage_meta = Evil(str(proof))
        (folder / ".metadata").write_bytes(pickle.dumps(content))
    if where == "beside":
        assert same(read(folder).state_dict, {"w": torch.ones(2, 2)})
    else:
        with pytest.raises(CheckpointError):
            read(folder)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1]), b"(" * 3_000_000 + b"."])
def test_what_is_no_index(tmp_path, content):
    folder = sliced(tmp_path / "d", [2, 2], [([0, 0], torch.ones(2, 2))])
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: (no index|truncated)"):
        read(folder)


def test_slices_without_their_index(tmp_path):
    folder = sliced(tmp_path / "d", [2, 2], [([0, 0], torch.ones(2, 2))])
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"the index '\.metadata' of its folder is missing"):
        read(folder)


# DeepSpeed and Megatron


def zero3(folder: Path, state: dict[str, Tensor], ranks: int, *, lost: int = 0) -> Path:
    """As DeepSpeed spreads parameters over ranks: each one padded, all of a rank in one tensor."""
    folder.mkdir(parents=True)
    flat: list[list[Tensor]] = [[] for _ in range(ranks)]
    for value in state.values():
        length = math.ceil(value.numel() / ranks)
        padded = torch.cat([value.reshape(-1), torch.full((ranks * length - value.numel(),), 9.0)])
        for rank in range(ranks):
            flat[rank].append(padded[rank * length : (rank + 1) * length])
    shapes = [{name: value.shape for name, value in state.items()}]
    module = {name: torch.empty(0) for name in state} | {"buffer": torch.arange(3)}
    for rank in range(ranks):
        model = {"module": module, "param_shapes": shapes, "buffer_names": ["buffer"]}
        model |= {"shared_params": {"tied": next(iter(state))}, "global_steps": 7}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        groups = {
            "zero_stage": 3,
            "fp32_flat_groups": [torch.cat(flat[rank])],
            "partition_count": ranks,
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": groups}, folder / name)
    for rank in range(lost):
        (folder / f"bf16_zero_pp_rank_{ranks - 1 - rank}_mp_rank_00_optim_states.pt").unlink()
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_zero_3_is_put_together(tmp_path, ranks):
    zero3(tmp_path / "run" / "global_step7", STATE, ranks)
    aside: set[str] = set()
    (file,) = find_checkpoints(tmp_path, aside=aside)
    checkpoint = read_checkpoint(file)
    expected = {**STATE, "buffer": torch.arange(3), "tied": STATE["0.weight"]}
    assert same(checkpoint.state_dict, expected)
    assert (checkpoint.metadata.run, checkpoint.metadata.step) == ("run", 7)
    assert len(aside) >= ranks


@pytest.mark.parametrize("lost", [1, 2])
def test_zero_3_without_all_ranks(tmp_path, lost):
    folder = zero3(tmp_path / "global_step7", STATE, 2, lost=lost)
    with pytest.raises(CheckpointError, match=r"cannot put together .*: run zero_to_fp32\.py"):
        read(folder)


@pytest.mark.parametrize("ranks", [(1,), (0, 2), (0, 1, 1)])
def test_zero_3_of_other_ranks_than_there_were(tmp_path, ranks):
    # As many numbers as two ranks have, in other places.
    folder = zero3(tmp_path / "global_step7", {"w": torch.arange(2.0), "v": torch.ones(1)}, 3)
    states = [folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)]
    content = [path.read_bytes() for path in states]
    for path in states:
        path.unlink()
    for place, rank in enumerate(ranks):
        kind = "bf16" if ranks.index(rank) == place else "fp16"
        (folder / states[rank].name.replace("bf16", kind)).write_bytes(content[rank])
    with pytest.raises(CheckpointError, match="states of its ranks are missing, or there twice"):
        read(folder)


def test_deepspeed_with_whole_weights_and_lightning(tmp_path):
    folder = tmp_path / "logs" / "epoch=1-step=20.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    module = {f"_forward_module.model.{name}": value for name, value in STATE.items()}
    torch.save({"module": module, "ds_version": "0.8"}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "logs" / "latest").write_text("checkpoint")
    checkpoint = read(tmp_path)
    assert same(checkpoint.state_dict, module)
    metadata = checkpoint.metadata
    assert (metadata.run, metadata.step, metadata.epoch) == ("logs", 20, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "one of 2 pieces"),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "one of 2 pieces"),
        (["mp_rank_00_000/model_rng.pt", "mp_rank_00_001/model_rng.pt"], "one of 2 pieces"),
        (["mp_rank_00_model_states.pt", "layer_01-model_00-model_states.pt"], "pipeline"),
    ],
)
def test_pieces_of_model_parallelism_are_refused(tmp_path, names, message):
    for name in names:
        path = tmp_path / "iter_0000500" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": STATE, "module": STATE}, path)
    files = find_checkpoints(tmp_path)
    assert files
    for file in files:
        assert file.run == tmp_path.name
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(file)


def test_megatron_with_one_piece(tmp_path):
    path = tmp_path / "run" / "iter_0000500" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": {"language_model": STATE}, "optimizer": {"a": torch.ones(2)}}, path)
    checkpoint = read(tmp_path)
    assert same(checkpoint.state_dict)
    assert (checkpoint.metadata.run, checkpoint.metadata.step) == ("run", 500)


# What lies beside weights


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "optimizer.bin", "optim.pt", "opt.pth", "optimizer_100.pt", "scaler.pt"),
        *(
            "optimizer-last.pt",
            "best_optimizer.pth",
            "lr_scheduler.pt",
            "scheduler.pt",
            "sampler.bin",
        ),
        *("rng_state.pth", "rng_state_3.pth", "training_args.bin", "random_states_0.pt"),
        *(
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt",
        ),
        *("distrib_optim.pt", "model.optimizer.pt", "grad_scaler.pt", "optimizer_state.pt"),
        *("random_states_0.pkl", "best_optimizer.pkl", "custom_checkpoint_0.pkl", "dataloader.bin"),
    ],
)
def test_states_are_left_aside_by_name(tmp_path, name):
    assert is_state_file(name)
    torch.save(STATE, tmp_path / name)
    torch.save(STATE, tmp_path / "model.pt")
    aside: set[str] = set()
    (file,) = find_checkpoints(tmp_path, aside=aside)
    assert file.path.endswith("model.pt")
    assert aside == {str(tmp_path / name)}
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/lipfast-aside/{name}": b"", "/lipfast-aside/model.pt": b""})
    try:
        aside.clear()
        assert len(find_checkpoints("memory://lipfast-aside", aside=aside)) == 1
        assert len(aside) == 1
    finally:
        memory.rm("/lipfast-aside", recursive=True)


@pytest.mark.parametrize(
    "name",
    ["model_optim_rng.pt", "opt-125m.pt", "optimum.pt", "sampled.pt", "net_opt.pt", "ema_100.pt"],
)
def test_other_names_are_not(name):
    assert not is_state_file(name)


@pytest.mark.parametrize(
    "content",
    [
        adam(),
        {"optimizer": adam(), "epoch": 3},
        [adam(), adam()],
        {"state": {0: {"m": torch.ones(2)}}},
        {"last_epoch": 3, "base_lrs": [0.1]},
    ],
    ids=["adam", "in a dict", "list", "numbered", "scheduler"],
)
def test_states_are_known_by_content(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NotWeightsError, match="holds the state of an optimizer"):
        read(tmp_path)


def test_an_archive_of_states_only_is_empty(tmp_path):
    torch.save(adam(), tmp_path / "optimizer.pt")
    with pytest.raises(ArchiveError, match="no checkpoints"):
        find_checkpoints(tmp_path)


# A run that is handed over as its own folder


@pytest.mark.parametrize(
    ("below", "archive", "run", "steps"),
    [
        (
            ["bert/checkpoint-5/m.pt", "bert/checkpoint-10/m.pt", "bert/m.pt"],
            "bert",
            "bert",
            {5, 10},
        ),
        (["bert/checkpoint-5/m.pt"], "bert/checkpoint-5", "bert", {5}),
        (["a/checkpoint_0/m.pt", "a/checkpoint_1/m.pt"], "a", "a", {0, 1}),
        (["a/checkpoints/checkpoint_3/m.pt"], "a/checkpoints", "a", {3}),
        (["a/checkpoints/checkpoint_3/m.pt"], "a", "a", {3}),
        (["v/checkpoints/epoch=1-step=9.ckpt", "v/checkpoints/last.ckpt"], "v", "v", {9}),
        (["v/checkpoints/epoch=1-step=9.ckpt"], "v/checkpoints", "v", {9}),
        (["v/checkpoints/epoch=1-step=9.ckpt"], "v/checkpoints/epoch=1-step=9.ckpt", "v", {9}),
        (["r/global_step100/m.pt", "r/global_step200/m.pt"], "r", "r", {100, 200}),
        (["r/iter_0000500/mp_rank_00/m.pt"], "r/iter_0000500", "r", {500}),
        (["r/epoch_3/m.pt", "r/epoch_4/m.pt"], "r", "r", set()),
        (["r/step_5/m.pt", "r/step=6/m.pt", "r/step-7k/m.pt"], "r", "r", {5, 6, 7000}),
        (["r/checkpoint-epoch-3/m.pt"], "r", "r", set()),
        (["r/a/m.pt", "r/b/m.pt"], "r/a", "a", set()),
    ],
)
def test_a_run_handed_over_is_one_run(tmp_path, below, archive, run, steps):
    for name in below:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(STATE, path)
    files = find_checkpoints(tmp_path / archive)
    metadata = [read_checkpoint(file).metadata for file in files]
    assert {file.run for file in files} == {one.run for one in metadata} == {run}
    assert {one.step for one in metadata} - {None} == steps
    # also where several runs are handed over together
    assert {file.run for file in find_checkpoints([tmp_path / archive])} == {run}


def test_shards_with_an_index_of_either_kind(tmp_path):
    for ending, save in (("safetensors", save_file), ("bin", torch.save)):
        folder = tmp_path / ending / "checkpoint-5"
        folder.mkdir(parents=True)
        stem = "model" if ending == "safetensors" else "pytorch_model"
        places = {}
        for number, (name, value) in enumerate(STATE.items(), 1):
            shard = f"{stem}-0000{number}-of-00002.{ending}"
            save({name: value}, folder / shard)
            places[name] = shard
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))
        checkpoint = read(tmp_path / ending)
        assert same(checkpoint.state_dict)
        assert (checkpoint.metadata.run, checkpoint.metadata.step) == (ending, 5)


DEEP = b")" + b"\x85" * 200_000
TWICE = b")" + b"q\1h\1\x86" * 80


@pytest.mark.parametrize("tuples", [DEEP, TWICE], ids=["deep", "twice"])
@pytest.mark.parametrize("where", ["key", "name", "path", "place", "size"])
def test_an_index_of_tuples_that_never_end(tmp_path, tuples, where):
    def thing(**fields: bytes) -> bytes:
        pairs = (b"V%b\n%b" % (name.encode(), value) for name, value in fields.items())
        return b"ca\nb\n)R}(" + b"".join(pairs) + b"ub"

    def at(name: str, usual: bytes) -> bytes:
        return tuples if where == name else usual

    size = b"ctorch\nSize\n" + at("size", b"K\1\x85") + b"\x85R"
    place = thing(relative_path=at("place", b"Vx.distcp\n"), offset=b"K\0", length=b"K\1")
    index = thing(
        state_dict_metadata=b"}" + at("key", b"Vw\n") + thing(size=size) + b"s",
        planner_data=b"}Vw\n" + at("path", b"Vw\n\x85") + b"s",
        storage_data=b"}" + thing(fqn=at("name", b"Vw\n")) + place + b"s",
    )
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + index + b".")
    (tmp_path / "x.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        read_checkpoint(*find_checkpoints(tmp_path))
