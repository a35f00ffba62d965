"""What to do about ops that have no rule, or whose rule does not cover a call."""

from __future__ import annotations

from collections.abc import Sequence

_WRITE = (
    "Write one with @lipfast.rule({op!r}); its function gets a lipfast.rules.Call and returns "
    "call.input times a Lipschitz constant of the op."
)
_REWRITE = (
    "What stands in brackets is why its rule does not cover a call: write that in another way, or "
    "give @lipfast.rule({op!r}, supports=...) a rule that covers it."
)
_PART = "Of several results the first alone has a rule: leave the others out."
_INSIDE = (
    "Blocks such as autocast, checkpointing and torch.cond are not looked into: take them out of "
    "the forward."
)
_BAKE = (
    "Bake what is computed from parameters into the state dict (for parametrizations: "
    "torch.nn.utils.parametrize.remove_parametrizations)."
)


def advice(missing: Sequence[str], computed: Sequence[object] = ()) -> str:
    """One sentence for each kind of what is missing.

    Args:
        missing: ops, followed by the reason in brackets where they have a rule.
        computed: what is beyond lipfast among ops on parameters alone.

    Examples:
        >>> print(advice(["aten.max[1]"]))
        Of several results the first alone has a rule: leave the others out.
    """
    missing = [op for op in missing if "[" not in op or op.partition("[")[0] not in missing]
    found = {_kind_of(op): op.partition(" ")[0] for op in reversed(missing)}
    kinds = [kind for kind in (_WRITE, _REWRITE, _PART, _INSIDE) if kind in found]
    sentences = [kind.format(op=found[kind]) for kind in kinds]
    return " ".join([*sentences, _BAKE] if computed else sentences)


def _kind_of(op: str) -> str:
    if op.startswith(("torch.", "get_attr.", "_")):  # no ops that a rule could be registered for
        return _INSIDE
    if " " in op:
        return _REWRITE
    return _PART if "[" in op else _WRITE
