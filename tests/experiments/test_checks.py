from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest

from experiments.checks import Above, AtLeast, Between, Described, NotEmpty, OneOf, checked

COUNT = Annotated[int, AtLeast(2)]
STEPS = Annotated[tuple[int, ...], AtLeast(0)]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (COUNT, 2, 2),
        (Annotated[float, Above(0)], 1, 1.0),
        (Annotated[float, Between(0, 1)], 1.0, 1.0),
        (bool, False, False),
        (Annotated[str, OneOf(("a", "b"))], "b", "b"),
        (Annotated[str, NotEmpty()], "x", "x"),
        (STEPS, [9, 0], (0, 9)),
        (Literal["full"] | COUNT, "full", "full"),
        (Literal["full"] | COUNT, 3, 3),
        (Annotated[COUNT | STEPS, Described("steps")], [1], (1,)),
    ],
)
def test_values_of_the_type_pass(kind: Any, value: object, expected: object) -> None:
    result = checked(kind, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (COUNT, 1, "an integer at least 2"),
        (COUNT, 2.0, "an integer at least 2"),
        (COUNT, True, "an integer at least 2"),
        (Annotated[float, Above(0)], "1", "a number above 0"),
        (Annotated[float, Above(0)], True, "a number above 0"),
        (Annotated[float, Above(0)], 0, "a finite number above 0"),
        (Annotated[float, AtLeast(0)], math.nan, "a finite number at least 0"),
        (Annotated[float, AtLeast(0)], math.inf, "a finite number at least 0"),
        (Annotated[float, Between(0, 1)], 1.5, "a finite number at least 0 and at most 1"),
        (bool, 1, "true or false"),
        (Annotated[str, OneOf(("a", "b"))], "c", 'one of "a", "b"'),
        (Annotated[str, OneOf(("a", "b"))], ["a"], 'one of "a", "b"'),
        (Annotated[str, NotEmpty()], "", "a text that is not empty"),
        (STEPS, 3, "a list of distinct integers, at least 0 each, not empty"),
        (STEPS, [], "a list of distinct integers, at least 0 each, not empty"),
        (STEPS, [1, 1], "a list of distinct integers, at least 0 each, not empty"),
        (STEPS, [-1], "a list of distinct integers, at least 0 each, not empty"),
        (Literal["full"] | COUNT, "half", '"full" or an integer at least 2'),
        (Annotated[COUNT | STEPS, Described("steps")], [1, 1], "steps"),
    ],
)
def test_other_values_say_what_is_expected(kind: Any, value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(kind, value)
    assert str(caught.value) == message


def test_names_that_are_registered_later_count() -> None:
    names = {"a": 1}
    kind = Annotated[str, OneOf(names)]
    names["b"] = 2
    assert checked(kind, "b") == "b"


def test_a_type_without_a_check_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="no check"):
        checked(dict, {})
