from __future__ import annotations

import json
import math

import pytest

from lipfast.checkpoints import Metadata, parse_value
from lipfast.text import printable


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-3", -3),
        ("0", 0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("007", "007"),
        ("00.5", "00.5"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("none", "none"),
        ("", ""),
        (" 1", " 1"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_parse_value(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_run_step_and_epoch():
    metadata = Metadata({"run": "12", "step": "100", "epoch": "2.5"}, folder="f")
    assert (metadata.run, metadata.step, metadata.epoch) == ("12", 100, 2.5)


@pytest.mark.parametrize(
    ("raw", "step"),
    [
        ({"global_step": 7}, 7),
        ({"step": "3.0"}, 3),
        ({"step": "3.5"}, None),
        ({"step": "true"}, None),
        ({"step": str(2**63)}, None),
        ({"step": "nan", "iteration": 4}, 4),
        ({}, None),
    ],
)
def test_step(raw, step):
    assert Metadata(raw).step == step


def test_run_falls_back_to_the_folder():
    assert Metadata({}, folder="w64/seed1").run == "w64/seed1"
    assert Metadata({"epoch": "soon"}).epoch is None


def test_json_is_strict():
    text = Metadata({"a": "nan", "b": "1", "c": "x\ud800", "d": math.inf}).to_json()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": "nan",
        "b": 1,
        "c": "x\\ud800",
        "d": "inf",
    }


def test_printable_escapes_control_and_direction_characters():
    assert printable("a\x1b\x07\x7f\x9b\u202eb\n") == "a\\x1b\\x07\\x7f\\x9b\\u202eb\\x0a"
    assert printable("a\nb\r", newlines=True) == "a\nb\\x0d"
    assert printable("Grüße 模型") == "Grüße 模型"
