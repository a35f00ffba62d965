"""Which of the tensors in a file an architecture takes, and what the row says about it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.checkpoints import CheckpointFile, Metadata, find_checkpoints, read_checkpoint
from lipfast.checkpoints.reader import Checkpoint
from lipfast.errors import CheckpointError, StateDictError
from lipfast.estimators.plan import Plan
from lipfast.scoring import read_scores, score
from lipfast.scoring.fit import fitted
from lipfast.scoring.single import bound_checkpoint

X = torch.zeros(2, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@cache
def plan_of_mlp() -> Plan:
    return lipfast.compile(mlp(), X)


def states(count: int, make: Callable[[], nn.Module] = mlp) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [dict(make().state_dict()) for _ in range(count)]


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def taken(tmp_path, content: Any, plan: Plan | None = None, prefix: str | None = None):
    torch.save(content, tmp_path / "a.pt")
    checkpoint = read_checkpoint(*find_checkpoints(tmp_path / "a.pt"), prefix=prefix)
    return fitted(checkpoint, plan or plan_of_mlp(), prefix)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("keys", "first", "second"),
    [
        (("model", "ema"), 0, "ema"),
        (("ema", "model"), 1, "ema"),
        (("model_ema", "model"), 1, "model_ema"),
        (("state_dict_ema", "state_dict"), 1, "state_dict_ema"),
        (("ema_state_dict", "weights"), 1, "ema_state_dict"),
        (("params_ema", "params"), 1, "params_ema"),
        (("teacher", "student"), 1, "teacher"),
        (("discriminator", "generator"), 1, "discriminator"),
        (("netD", "netG"), 1, "netD"),
        (("critic", "actor"), 1, "critic"),
        (("target", "online"), 1, "target"),
        (("swa", "raw"), 1, "swa"),
        (("b", "a"), 0, "a"),
        (("average", "averaged_model", "teacher"), 2, "averaged_model"),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_of_several_networks_the_documented_order_takes_one(tmp_path, keys, first, second, flat):
    nets = states(len(keys))
    pairs = list(zip(keys, nets, strict=True))
    content: dict[str, Any] = dict(pairs)
    if flat:
        content = {"state_dict": {k: v for key, net in pairs for k, v in below(key, net).items()}}
    found = taken(tmp_path, content)
    where = f"state_dict.{keys[first]}" if flat else keys[first]
    assert same(found.state_dict, nets[first])
    assert f"weights below '{where}' taken" in found.note
    assert second in found.note
    assert "--prefix" in found.note
    chosen = taken(tmp_path, content, prefix=second)
    assert same(chosen.state_dict, nets[keys.index(second)])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: {"state": {"model": {"net": {"state_dict": net}}}},
        lambda net: {"models": [{"net": net}]},
        lambda net: [net, 3],
        lambda net: ({"epoch": 3}, {"anything": net}),
        lambda net: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "x": {"y": net}},
        lambda net: below("module", net),
        lambda net: below("module._orig_mod.module", net),
        lambda net: below("_orig_mod.module.model", net),
        lambda net: below("_fsdp_wrapped_module", net),
        lambda net: below("model._checkpoint_wrapped_module._fsdp_wrapped_module", net),
        lambda net: {
            k.replace(".", "._fsdp_wrapped_module._checkpoint_wrapped_module.", 1): v
            for k, v in net.items()
        },
        lambda net: {k.replace(".", ".module.", 1): v for k, v in net.items()},
        lambda net: below("module", {k.replace(".", "._orig_mod.", 1): v for k, v in net.items()}),
    ],
)
def test_one_network_below_any_keys_and_wrappers_needs_no_note(tmp_path, wrap):
    (net,) = states(1)
    found = taken(tmp_path, wrap(net))
    assert same(found.state_dict, net)
    assert found.note == ""


@pytest.mark.parametrize("prefix", ["ema_model.module", "teacher", "swa_model"])
def test_averages_and_teachers_are_said_even_where_they_are_alone(tmp_path, prefix):
    (net,) = states(1)
    found = taken(tmp_path, {"state_dict": below(prefix, net)})
    assert same(found.state_dict, net)
    assert found.note == f"weights below 'state_dict.{prefix}' taken"


LEVELS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def wrapped_at_random(net: dict[str, Tensor], chance: random.Random) -> Any:
    """A network below up to three random keys, its names wrapped, beside what a trainer keeps."""
    for level in chance.sample(LEVELS, chance.randint(0, 3)):
        net = below(level, net)
    if chance.random() < 0.3:
        net = {name.replace(".", f".{chance.choice(LEVELS[:3])}.", 1): v for name, v in net.items()}
    content: Any = {**net, **({"n_averaged": torch.tensor(2)} if chance.random() < 0.3 else {})}
    for key in chance.sample(("model", "net", "state_dict", "x", "weights"), chance.randint(0, 3)):
        content = [content] if chance.random() < 0.2 else {key: content}
        beside: dict[str, Any] = {
            "optimizer": {"state": {0: {"m": torch.ones(6, 4)}}, "param_groups": []},
            "epoch": 3,
            "best": torch.tensor(0.5),
            "ema_optimizer": {"0.weight": torch.ones(6, 4)},
        }
        if isinstance(content, dict):
            names = chance.sample(sorted(beside), chance.randint(0, 4))
            content = {**content, **{name: beside[name] for name in names}}
    return content


@pytest.mark.parametrize("seed", range(100))
def test_networks_below_random_keys_and_wrappers(tmp_path, seed):
    (net,) = states(1)
    found = taken(tmp_path, wrapped_at_random(net, random.Random(seed)))
    assert same(found.state_dict, net)


def test_parts_in_separate_dicts_make_one_network(tmp_path):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    torch.manual_seed(0)
    pair = Pair()
    parts = {name: child.state_dict() for name, child in pair.named_children()}
    found = taken(tmp_path, {"epoch": 3, "weights": parts}, lipfast.compile(pair, X))
    assert same(found.state_dict, pair.state_dict())


@pytest.mark.parametrize(
    "prefix", ["ema", "state_dict.ema", "ema.module", "state_dict.ema.module."]
)
def test_a_prefix_is_all_that_stands_before_the_names_or_parts_of_it(tmp_path, prefix):
    raw, ema = states(2)
    content = {"state_dict": {**below("model", raw), **below("ema.module", ema)}}
    found = taken(tmp_path, content, prefix=prefix)
    assert same(found.state_dict, ema)
    assert "weights below 'state_dict.ema.module' taken" in found.note
    torch.save(content, tmp_path / "a.pt")
    read = read_checkpoint(*find_checkpoints(tmp_path / "a.pt"), prefix="ema.module")
    assert same(read.state_dict, ema)


def test_an_empty_prefix_is_that_of_names_that_nothing_precedes(tmp_path):
    raw, ema = states(2)
    for content in ({**raw, **below("ema", ema)}, {**below("ema", ema), **raw}):
        assert same(taken(tmp_path, content).state_dict, raw)
        assert same(taken(tmp_path, content, prefix="").state_dict, raw)
        assert same(taken(tmp_path, content, prefix="ema").state_dict, ema)
        plan = plan_of_mlp()
        with pytest.raises(StateDictError, match="does not match the architecture"):
            plan.check(taken(tmp_path, content, plan, prefix="0").state_dict)


def test_a_network_that_is_asked_for_is_never_another(tmp_path):
    (net,) = states(1)
    (wide,) = states(1, lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)))
    plan = plan_of_mlp()
    found = taken(tmp_path, {"model": wide, "ema": net}, plan, prefix="model")
    with pytest.raises(StateDictError, match=r"'0\.weight' has shape \(9, 4\)"):
        plan.check(found.state_dict)


def test_an_unknown_prefix_is_refused(tmp_path):
    raw, ema = states(2)
    with pytest.raises(CheckpointError, match=r"a\.pt: no name begins with 'teacher\.'; .*'model"):
        taken(tmp_path, {"model": raw, "ema": ema}, prefix="teacher")


def test_a_network_that_is_asked_for_may_lie_beside_one_that_is_not_read(tmp_path):
    (net,) = states(1)
    sparse = {name: tensor.to_sparse() for name, tensor in net.items()}
    content = {"model": sparse, "ema": net}
    assert same(taken(tmp_path, content, prefix="ema").state_dict, net)
    found = score(tmp_path, arch=mlp, data=torch.ones(3, 4), out=tmp_path / "s", prefix="ema")
    assert found.scored == 1
    assert bound_checkpoint(tmp_path / "a.pt", arch=mlp, prefix="ema")[1].certified
    for chosen in (None, "model", ""):
        with pytest.raises(CheckpointError, match=r"'model\.0\.weight' is a sparse tensor"):
            taken(tmp_path, content, prefix=chosen)
    with pytest.raises(CheckpointError, match=r"'ema\.0\.weight' is a sparse tensor"):
        taken(tmp_path, {"model": net, "ema": sparse}, prefix="ema")
    assert same(taken(tmp_path, {**net, "graph": {"adjacency": sparse["0.bias"]}}).state_dict, net)


def test_a_network_of_other_shapes_is_none_of_those_that_fit(tmp_path):
    (net,) = states(1)
    (wide,) = states(1, lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)))
    found = taken(tmp_path, {"model": wide, "ema": net})
    assert same(found.state_dict, net)
    assert "weights below 'ema' taken; 4 tensors not used: 'model.0.weight'" in found.note


# Tensors that the architecture lacks


@pytest.mark.parametrize(
    "extra",
    [
        {"loss.weight": torch.ones(3)},
        {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)},
        {"n_averaged": torch.tensor(3)},
        {"0.num_batches_tracked": torch.tensor(3)},
        {"embeddings.position_ids": torch.arange(3)},
        {"rotary.inv_freq": torch.ones(3)},
        {"val_acc.tp": torch.ones(3, dtype=torch.long)},
        {"0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
    ],
    ids=",".join,
)
def test_what_the_architecture_does_not_use_is_said(tmp_path, extra):
    (net,) = states(1)
    found = taken(tmp_path, {**net, **extra})
    assert same(found.state_dict, net)
    assert f"{len(extra)} tensor" in found.note
    assert all(f"'{name}'" in found.note for name in extra)
    with pytest.raises(StateDictError, match="the architecture does not have"):
        plan_of_mlp().upper({**net, **extra})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("0.weight_scale", "belongs to the architecture's layer '0'"),
        ("0.running_mean", "belongs to the architecture's layer '0'"),
        ("2.lora_A.weight", "belongs to the architecture's layer '2'"),
        ("0.parametrizations.bias.original", "belongs to the architecture's layer '0'"),
        ("4.weight", "a layer beside those of the architecture"),
        ("1.weight", "a layer beside those of the architecture"),
        ("bn.weight", "a layer beside those of the architecture"),
        ("layer_norm1.weight", "a layer beside those of the architecture"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model"])
def test_what_makes_it_another_function_is_refused(tmp_path, extra, message, prefix):
    (net,) = states(1)
    content = {**net, extra: torch.ones(6)}
    with pytest.raises(StateDictError, match=message):
        taken(tmp_path, below(prefix, content) if prefix else content)


@pytest.mark.parametrize(
    "name", ["_flat_param", "model._fsdp_wrapped_module._flat_param", "flat_param_0"]
)
def test_weights_that_fsdp_joined_are_refused_with_what_to_do(tmp_path, name):
    with pytest.raises(StateDictError, match=r"that FSDP joined into one: save with"):
        taken(tmp_path, {name: torch.ones(51)})


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_what_is_missing_is_never_passed(tmp_path, name):
    (net,) = states(1)
    del net[name]
    plan = plan_of_mlp()
    for content in (net, {"model": net, "loss.weight": torch.ones(3)}, below("module", net)):
        found = taken(tmp_path, content, plan)
        with pytest.raises(StateDictError, match=f"lacks .*'{name}'"):
            plan.check(found.state_dict)


# Other names of one tensor


def weight_norm(old: bool) -> nn.Module:
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 3), dim=None))


def spectral_norm(old: bool) -> nn.Module:
    wrap = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [weight_norm, spectral_norm])
@pytest.mark.parametrize("old", [True, False])
def test_old_and_new_parametrisations_have_the_same_bound(tmp_path, make, old):
    torch.manual_seed(0)
    trained, built = make(old), make(not old)
    trained(torch.randn(3, 4))
    trained.eval()
    plan = lipfast.compile(built.eval(), X)
    found = taken(tmp_path, below("model", trained.state_dict()), plan)
    names = built.state_dict().keys()
    assert found.state_dict.keys() == names
    assert found.note.startswith("read '0.")
    expected = lipfast.upper_bound(trained, X).value
    assert plan.upper(found.state_dict).value == pytest.approx(expected, rel=1e-6)
    x = torch.randn(3, 4)
    built.load_state_dict(found.state_dict)
    torch.testing.assert_close(built(x), trained(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_plan_takes_what_torch_loads_and_no_more():
    torch.manual_seed(0)
    old, new = weight_norm(True), weight_norm(False)
    new.load_state_dict(old.state_dict())
    expected = lipfast.compile(new, X).upper(new.state_dict()).value
    assert lipfast.compile(new, X).upper(old.state_dict()).value == expected
    with pytest.raises(StateDictError, match=r"lacks '0\.weight_g'"):
        lipfast.compile(old, X).upper(new.state_dict())
    lacking = {k: v for k, v in old.state_dict().items() if k != "0.weight_v"}
    with pytest.raises(StateDictError, match="original1"):
        lipfast.compile(new, X).upper(lacking)
    old, new = spectral_norm(True), spectral_norm(False)
    for built, trained in ((old, new), (new, old)):
        with pytest.raises(RuntimeError):
            built.load_state_dict(trained.state_dict())
        with pytest.raises(StateDictError, match="lacks"):
            lipfast.compile(built.eval(), X).upper(trained.state_dict())


def test_a_batch_norm_without_its_count(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    plan = lipfast.compile(model, X)
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert plan.upper(state).value == plan.upper(model.state_dict()).value
    found = taken(tmp_path, state, plan)
    assert found.note == "1 count of batches absent, never read"
    assert plan.upper(found.state_dict).value == plan.upper(state).value
    del state["1.running_mean"]
    with pytest.raises(StateDictError, match="running_mean"):
        plan.upper(state)


def test_gamma_and_beta_of_old_layer_norms(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    plan = lipfast.compile(model, X)
    renamed = {"1.weight": "1.gamma", "1.bias": "1.beta"}
    state = {renamed.get(k, k): v for k, v in model.state_dict().items()}
    found = taken(tmp_path, state, plan)
    assert same(found.state_dict, model.state_dict())
    assert found.note == "read '1.gamma' as '1.weight', '1.beta' as '1.bias'"
    with pytest.raises(StateDictError, match="lacks"):
        plan.upper(state)


def test_notes_are_in_the_store_and_the_summary(tmp_path):
    raw, ema = states(2)
    torch.save({"model": raw, "ema": ema}, tmp_path / "both.pt")
    torch.save(raw, tmp_path / "raw.pt")
    summary = score(tmp_path, arch=mlp, data=torch.ones(3, 4), out=tmp_path / "s")
    note = "weights below 'model' taken; 'ema' fits, too: --prefix chooses"
    assert (summary.scored, summary.noted, summary.notes) == (2, 1, {note: 1})
    assert f"  1 scored with a note: {note}" in str(summary).splitlines()
    rows = read_scores(tmp_path / "s").to_pydict()
    assert rows["note"] == [note, None]
    assert rows["upper"][0] == rows["upper"][1]
    other = score(tmp_path, arch=mlp, data=torch.ones(3, 4), out=tmp_path / "s2", prefix="ema")
    assert (other.scored, other.failed) == (1, 1)
    expected = plan_of_mlp().upper(ema).value
    ok = [r for r in read_scores(tmp_path / "s2").to_pylist() if r["status"] == "ok"]
    assert math.isclose(ok[0]["upper"], expected, rel_tol=1e-5)


def test_a_checkpoint_that_was_made_by_hand_is_taken_as_it_is():
    (net,) = states(1)
    file = CheckpointFile("file:///a.pt", "/a.pt", 1, 0.0, "a")
    checkpoint = Checkpoint(file, net, Metadata({}))
    assert same(fitted(checkpoint, plan_of_mlp()).state_dict, net)


class WithExtra(nn.Linear):
    """A layer whose extra state is a tensor."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(2)

    def set_extra_state(self, state: Tensor) -> None:
        pass


@pytest.mark.parametrize("extra", [None, torch.ones(2), torch.ones(5)])  # of any shape, or absent
def test_extra_state_is_neither_missed_nor_compared(tmp_path, extra):
    plan = lipfast.compile(nn.Sequential(WithExtra(4, 6), nn.ReLU(), WithExtra(6, 3)), X)
    (net,) = states(1)
    beside = {} if extra is None else {"0._extra_state": extra}  # of the other layer it is absent
    found = taken(tmp_path, {"epoch": 1, "net": {"core": net | beside}}, plan)
    assert same({name: found.state_dict[name] for name in net}, net)
    assert not found.note
    assert plan.upper(found.state_dict).value == plan_of_mlp().upper(net).value
