"""What is said about ops without a rule."""

from __future__ import annotations

import pytest

from lipfast.rules.advice import advice


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["aten.foo"], ["@lipfast.rule('aten.foo')"]),
        (["aten.foo", "aten.bar"], ["@lipfast.rule('aten.foo')"]),
        (["aten.max (over the samples)"], ["@lipfast.rule('aten.max', supports="]),
        (["aten.max[1]"], ["leave the others out"]),
        (["aten.chunk", "aten.chunk[0]"], ["@lipfast.rule('aten.chunk')"]),
        (["torch.ops.higher_order.cond", "get_attr.true (control flow)"], ["take them out"]),
        (["_operator.getitem"], ["take them out"]),
        (["aten.foo", "aten.max[1]"], ["@lipfast.rule('aten.foo')", "leave the others out"]),
    ],
)
def test_one_sentence_for_each_kind(missing: list[str], said: list[str]) -> None:
    text = advice(missing)
    assert text.count(". ") == len(said) - 1
    for part in said:
        assert part in text


def test_what_is_computed_is_to_be_baked() -> None:
    assert advice([], [("aten.clip", "")]).startswith("Bake what is computed")
