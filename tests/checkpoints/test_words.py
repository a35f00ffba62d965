"""What keys say by their words."""

from __future__ import annotations

import pytest

from lipfast.checkpoints.words import is_state, natural, standing

RAW = ("model", "student", "optimal", "schema", "memory", "online", "bestiary", "net_g", "scheme")
SECOND = ("teacher", "model_old", "netD", "d", "disc", "value2", "target_net", "best_model")
AVERAGES = (
    "ema",
    "model_ema",
    "emaModel",
    "netEMA",
    "params-ema",
    "emaweights",
    "swa_model",
    "EMA",
)


@pytest.mark.parametrize(("rank", "keys"), [(0, RAW), (1, SECOND), (2, AVERAGES)])
def test_raw_weights_go_before_second_ones_and_averages(rank, keys):
    assert {key: standing(f"state_dict.{key}.")[0] for key in keys} == dict.fromkeys(keys, rank)


STATES = (
    *("optimizer", "optimizer_states", "optim", "optim_g", "lr_scheduler", "schedulers", "sched"),
    *("scaler", "grad_scaler", "loss_scaler0", "rng_state", "cuda_rng_state", "random_state"),
    *("random_states_0", "callbacks", "loops", "opt", "opt_state", "amp", "native_scaler"),
)
NONE = (
    *("upscaler", "out_scaler", "input_scaler", "optimal", "optimal_weights", "lora_rng"),
    *("string", "opt_model", "range", "model", "schedule_net", "loopsy", "generator", "0"),
)


@pytest.mark.parametrize(("expected", "keys"), [(True, STATES), (False, NONE)])
def test_states_are_known_by_whole_words(expected, keys):
    assert {key: is_state(key) for key in keys} == dict.fromkeys(keys, expected)


def test_long_keys_are_looked_at_in_part():
    assert standing("_teacher" * 1_000_000 + "\n")[0] == 1
    assert not is_state("x" * 1_000_000 + "optimizer")


def test_numbers_in_names_are_compared_as_numbers():
    names = ["net10.2", "net2.10", "net2.9", "a", "net002.1", "9" * 5000]
    expected = ["9" * 5000, "a", "net002.1", "net2.9", "net2.10", "net10.2"]
    assert sorted(names, key=natural) == sorted(expected, key=natural) == expected
