"""What of a file a network does not use: harmless, or what makes it another function."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from lipfast.checkpoints.words import WRAPPERS, standing, words_of
from lipfast.checkpoints.wrapped import NUMBER, SINGLE, STATE
from lipfast.errors import StateDictError
from lipfast.plan.renamed import is_extra_state
from lipfast.text import printable

# Of what is beside the weights in a module, what does not change the function in eval mode.
_HARMLESS = re.compile(
    r"num_batches_tracked|n_averaged|position_ids|token_type_ids|inv_freq|masked_bias|mask_token"
    r"|relative_position_index|relative_coords_table|attn_mask|total_ops|total_params"
)
# Names of layers that are counted, and of normalisations between layers.
_LIST = re.compile(
    r"(?P<stem>|fc|lin|linear|dense|conv|deconv|layers?|blocks?|stages?|res|h|l)_?\d+",
    re.IGNORECASE,
)
_NORM = re.compile(r"(?:.*_)?(?:bn|ln|(?:batch|layer|group|rms)?_?norm)_?\d*", re.IGNORECASE)
# Words of what multiplies, or is added to, what layers give: in a network it changes the function.
_FACTORS = frozenset(
    ("scale", "scales", "scaling", "scaler", "gain", "gains", "std", "lora", "loras", "dora")
)
# Words of modules between layers, and beside them.
_SIDE_WORDS = frozenset(
    (
        *("act", "acts", "activation", "activations", "nonlinearity", "prelu"),
        *("skip", "shortcut", "downsample", "residual", "norm", "norms", "bn", "ln"),
    )
)
# Words of what a trainer adds to a network: no part of its function.
_TRAINING = frozenset(
    (
        *("loss", "losses", "criterion", "objective", "metric", "metrics", "acc", "accuracy"),
        *("train", "val", "valid", "validation", "test", "best", "optimizer", "scheduler"),
        *("lr", "grad", "gradient", "noise", "init", "ema", "aux", "auxiliary"),
    )
)
# What holds networks, each one whole, in a numbered list.
_NETWORKS = frozenset(
    (
        *("nets", "networks", "models", "members", "ensemble", "ensembles", "experts", "critics"),
        *("actors", "agents", "policies", "estimators", "replicas", "net", "model", "modules"),
    )
)
_MAX_STEMS = 16
_HALVES = ({"enc", "encoder"}, {"dec", "decoder"})


def require_harmless(
    unused: Sequence[str],
    beside: Mapping[str, str],
    prefix: str,
    parameters: Mapping[str, Sequence[int]],
    *,
    chosen: bool,
) -> None:
    """Refuse what lies in the network and the architecture lacks where it may change the function.

    Args:
        unused: full names of tensors.
        beside: full names to kinds of what is no tensor that was read.
        prefix: what the network's names begin with.
        parameters: those of the architecture.
        chosen: whether the user said the prefix, and so may want a part of a network.

    Raises:
        StateDictError: one lies in a layer of the architecture, continues a list of its layers, or
            is by its name a factor, a normalisation or a branch.
    """
    suspects = [(name, "") for name in unused if name.startswith(prefix)]
    for name, kind in beside.items():
        # numbers at the top of a file are its metadata, whatever they are called
        is_setting = kind == NUMBER and not prefix and "." not in name
        if name.startswith(prefix) and not is_setting:
            suspects.append((name, kind))
    if not suspects:
        return
    owners = {name.rpartition(".")[0] for name in parameters}
    modules = {""} | {part for name in parameters for part in _modules_above(name)}
    numbered = {kind for kind in map(_numbered, modules) if kind is not None}
    relatives = _relatives(modules)
    for name, kind in suspects:
        own = name.removeprefix(prefix)
        if _HARMLESS.fullmatch(own.rpartition(".")[2]) or is_extra_state(own):
            continue
        shown = f"the file has '{printable(own[:200])}'{f' ({printable(kind)})' if kind else ''}"
        layer, first = _layer_and_first(own, owners, modules)
        layer = own if own in owners else layer  # a dict or a list of the layer's name
        if layer is None and "" in owners and re.fullmatch(r"(weight|bias|running|scale).*", own):
            layer = ""
        if layer is not None:
            raise StateDictError(
                f"{shown}, which belongs to the architecture's layer '{layer}' and which the "
                "architecture lacks: another function. Build it as it was trained"
            )
        # inside modules that are not known at all names say nothing: these are said in the note
        named = (first or own).rpartition(".")[2]
        is_known = not first or first.rpartition(".")[0] in modules
        if _numbered(first) in numbered or (is_known and _changes(named, is_module=bool(first))):
            raise StateDictError(
                f"{shown}, a layer beside those of the architecture that the architecture lacks: "
                "another function. Build it as it was trained (--arch-arg)"
            )
        parent, _, module = first.rpartition(".")
        if not chosen and any(
            _are_parts(parent, one, module)
            for stem in _stems(module)
            for one in relatives.get((parent, stem), ())
        ):
            raise StateDictError(
                f"{shown}: the architecture is a part of its network, by its name. Build the whole "
                f"network, or take the part with --prefix '{printable(prefix.strip('.'))}'"
            )


def require_whole(prefix: str, names: Iterable[str], levels: Collection[str]) -> None:
    """Refuse weights that are a part of a network by the names beside them.

    Args:
        prefix: what the names of the weights begin with.
        names: of all tensors of the file.
        levels: what names begin with that is a dict of the file: in one of its own a network is
            whole.

    Raises:
        StateDictError: says what the other part is.
    """
    level = max((one for one in {*_beginnings(prefix)} if one in levels), key=len, default="")
    parents = {
        parent: prefix[len(parent) :].partition(".")[0]
        for parent in _beginnings(prefix)
        if len(level) <= len(parent) < len(prefix)
    }
    for name in names:
        for parent, own in parents.items():
            other = name[len(parent) :].partition(".")[0] if name.startswith(parent) else own
            if other != own and _are_parts(parent, own, other):
                shown = printable(prefix.strip("."))
                raise StateDictError(
                    f"the weights below '{shown}' fit, but the file has '{printable(name[:200])}' "
                    "beside them: a part of a network, by its name. Build the whole network, or "
                    f"take the part with --prefix '{shown}'"
                )


def is_notable(kind: str) -> bool:
    """Whether a thing beside the weights is said where it is not used: tensors are."""
    return kind != SINGLE and (kind == STATE or "tensor" in kind.lower())


def _layer_and_first(own: str, owners: set[str], modules: set[str]) -> tuple[str | None, str]:
    """The layer of the architecture that a name lies in, and the first module it does not have."""
    layer = None
    for part in _modules_above(own):
        if part not in modules:
            return layer, part
        layer = part if part in owners else layer
    return layer, ""


def _relatives(modules: Iterable[str]) -> Mapping[tuple[str, str], set[str]]:
    """What a module holds, by the beginnings of names and by halves that are there."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module in modules:
        parent, _, name = module.rpartition(".")
        for stem in _stems(name):
            found[parent, stem].add(name)
    return found


def _stems(name: str) -> set[str]:
    """Beginnings of a name up to an underscore, itself, and a mark where it is a half."""
    parts = name.split("_", _MAX_STEMS)
    stems = {name, *("_".join(parts[:count]) for count in range(1, len(parts)))}
    halves = set(words_of(name)) & _HALVES[0].union(_HALVES[1])
    return stems | {"/"} if halves else stems  # which is in no name of a module


def _changes(name: str, *, is_module: bool) -> bool:
    """Whether what a module or a tensor is called says that it changes the function around it."""
    words = set(words_of(name))
    if words & _TRAINING:
        return False
    is_layer = is_module and (_NORM.fullmatch(name) is not None or bool(words & _SIDE_WORDS))
    return is_layer or bool(words & _FACTORS)


def _beginnings(name: str) -> Iterator[str]:
    """What stands before each part of a name: of `a.b.c` nothing, `a.` and `a.b.`."""
    yield ""
    for module in _modules_above(name):
        yield f"{module}."


def _are_parts(parent: str, one: str, other: str) -> bool:
    """Whether two modules beside one another are parts of one network by their names."""
    if not (one and other) or one in WRAPPERS or standing(one)[0] or standing(other)[0]:
        return False
    words, others = set(words_of(one)), set(words_of(other))
    if (words | others) & _TRAINING:
        return False
    kind = _numbered(one)
    if kind is not None and kind == _numbered(other):
        holder = words_of(parent.strip(".").rpartition(".")[2])
        return bool(kind[1]) or _NETWORKS.isdisjoint(holder)
    if any(words & half and others & _HALVES[1 - at] for at, half in enumerate(_HALVES)):
        return True
    return other.startswith(f"{one}_") or one.startswith(f"{other}_")


def _numbered(module: str) -> tuple[str, str] | None:
    """What a module is one of several of: `a.blocks.3` and `a.blocks.4`, `fc1` and `fc2`."""
    parent, _, name = module.rpartition(".")
    found = _LIST.fullmatch(name)
    return None if found is None else (parent, found["stem"])


def _modules_above(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, without the whole: of `a.b.weight` `a` and `a.b`."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
