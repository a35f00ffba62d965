"""The network of a checkpoint that an architecture describes: which names are its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lipfast.checkpoints import Checkpoint
from lipfast.checkpoints.wrapped import standing
from lipfast.errors import StateDictError
from lipfast.estimators.plan import Plan
from lipfast.plan.renamed import equivalent_names, is_counter, is_extra_state
from lipfast.text import counted

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
_FLAT = re.compile(r"(?:.*\.)?_?flat_param(?:_\d+)?")
_FIRST_FEW = 5
_LONGEST_NAME = 200  # characters of a name; the file is untrusted


@dataclass(frozen=True)
class _Network:
    """One network of a file that has all names of a plan.

    Attributes:
        prefix: what all its names begin with.
        names: the plan's name -> that in the file; None for what may be absent.
        fits: whether all shapes are the plan's.
    """

    prefix: str
    names: Mapping[str, str | None]
    fits: bool


def fitted(checkpoint: Checkpoint, plan: Plan, prefix: str | None = None) -> Checkpoint:
    """Return the checkpoint with the entries that belong to the plan's module, and a note.

    A LightningModule, for instance, keeps its network as `self.model` and saves `model.0.weight`
    beside whatever else it has. The network below a prefix that makes all names of the plan, of its
    shapes, is taken; of several, the one that goes first in the order of `standing`, then of the
    file (by name in safetensors). Names of weight norm, spectral norm and layer norms are taken in
    their other spelling. The note says which network was taken where there are others, what was
    renamed, and which tensors were not used.

    Args:
        checkpoint: as read, with the same prefix.
        plan: what names are wanted.
        prefix: of the network, with or without its final dot, where the user says it: all parts
            before the names, or some of them, such as `ema` for `state_dict.ema.0.weight`;
            empty for the one whose names begin with nothing.

    Raises:
        StateDictError: unused tensors belong to layers of the architecture or continue them, so
            that the file's network is another.
    """
    tensors = checkpoint.tensors or checkpoint.state_dict
    own = checkpoint.state_dict
    alone = prefix is None and len(tensors) == len(own)
    if not plan.parameters or (alone and own.keys() == plan.parameters.keys()):
        return checkpoint
    found = _networks(tensors, plan)
    if not found:  # perhaps every block was wrapped in DistributedDataParallel
        shorter = {_without_module(name): tensor for name, tensor in tensors.items()}
        if len(shorter) == len(tensors):
            tensors, found = shorter, _networks(shorter, plan)
    taken = next((network for network in found if _is_wanted(network.prefix, prefix)), None)
    if taken is None:
        return _mismatching(checkpoint)
    state_dict = {name: tensors[at] for name, at in taken.names.items() if at is not None}
    others = [other for other in found if other is not taken and other.fits]
    unused = _unused(tensors, taken, others)
    _require_harmless(unused, taken.prefix, plan)
    return replace(checkpoint, state_dict=state_dict, note=_note(taken, others, unused))


def _is_wanted(prefix: str, chosen: str | None) -> bool:
    """Whether what stands before a network's names is, or holds, what the user says."""
    if chosen is None or not chosen.strip("."):
        return chosen is None or not prefix
    return f".{chosen.strip('.')}." in f".{prefix}"


def _networks(tensors: Mapping[str, Tensor], plan: Plan) -> list[_Network]:
    """All networks with the plan's names, the best first; those of other shapes only if alone."""
    first = next((name for name in plan.parameters if not _may_be_absent(name)), None)
    if first is None:
        return []
    ends = _spellings(first, plan)
    starts = dict.fromkeys(
        name.removesuffix(end)
        for name in tensors
        for end in ends
        if name.endswith(end) and name[-len(end) - 1 : -len(end)] in ("", ".")
    )
    found = [network for start in starts if (network := _network(tensors, start, plan)) is not None]
    # sorted() keeps the order of the file among equals
    found = sorted(found, key=lambda one: standing(one.prefix) if one.prefix else (0, -1))
    return [one for one in found if one.fits] or found


def _network(tensors: Mapping[str, Tensor], start: str, plan: Plan) -> _Network | None:
    names: dict[str, str | None] = {}
    fits = True
    for own, shape in plan.parameters.items():
        if is_extra_state(own):
            continue
        name: str | None = f"{start}{own}"
        if name not in tensors:
            others = (f"{start}{spelling}" for spelling in _spellings(own, plan))
            name = next((spelling for spelling in others if spelling in tensors), None)
        if name is None and not is_counter(own):
            return None
        names[own] = name
        fits = fits and (name is None or tuple(tensors[name].shape) == tuple(shape))
    return _Network(start, names, fits)


def _may_be_absent(name: str) -> bool:
    return is_counter(name) or is_extra_state(name)


def _spellings(name: str, plan: Plan) -> tuple[str, ...]:
    return (name, *plan.aliases.get(name, ()), *equivalent_names(name))


def _without_module(name: str) -> str:
    return name.replace(".module.", ".").removeprefix("module.")


def _mismatching(checkpoint: Checkpoint) -> Checkpoint:
    """What the plan is compared with where nothing fits, so that the error says what is wrong."""
    flat = next((name for name in checkpoint.state_dict if _FLAT.fullmatch(name)), None)
    if flat is not None:
        raise StateDictError(
            f"'{flat}' holds the parameters of many layers that FSDP joined into one: save with "
            "StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint"
        )
    return checkpoint


def _unused(
    tensors: Mapping[str, Tensor], taken: _Network, others: Sequence[_Network]
) -> list[str]:
    """Names that neither the network nor another one beside it accounts for."""
    used = {name for network in (taken, *others) for name in network.names.values()}
    apart = {one.prefix for one in others if one.prefix and one.prefix != taken.prefix}
    inside = _is_below(taken.prefix, apart)
    return [
        name
        for name in tensors
        if name not in used and not is_extra_state(name) and (inside or not _is_below(name, apart))
    ]


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    return bool(prefixes) and any(f"{part}." in prefixes for part in _above(name))


def _require_harmless(unused: Sequence[str], prefix: str, plan: Plan) -> None:
    """Refuse tensors of the network that the architecture lacks where they may change the function.

    Raises:
        StateDictError: one lies in a layer of the architecture, or continues a list of its layers.
    """
    owners = {name.rpartition(".")[0] for name in plan.parameters}
    modules = {""} | {part for name in plan.parameters for part in _above(name)}
    numbered = {kind for kind in map(_numbered, modules) if kind is not None}
    for name in unused:
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or any(map(_HARMLESS.fullmatch, own.split("."))):
            continue
        layer, first = None, ""
        for part in _above(own):
            if part not in modules:
                first = part
                break
            layer = part if part in owners else layer
        if layer is None and "" in owners and re.fullmatch(r"(weight|bias|running|scale).*", own):
            layer = ""
        if layer is not None:
            raise StateDictError(
                f"the file has '{own}', which belongs to the architecture's layer '{layer}' and "
                "which the architecture lacks: another function. Build it as it was trained"
            )
        if _numbered(first) in numbered or (
            _NORM.fullmatch(first.rpartition(".")[2]) and first.rpartition(".")[0] in modules
        ):
            raise StateDictError(
                f"the file has '{own}', a layer beside those of the architecture that the "
                "architecture lacks: another function. Build it as it was trained (--arch-arg)"
            )


def _numbered(module: str) -> tuple[str, str] | None:
    """What a module is one of several of: `a.blocks.3` and `a.blocks.4`, `fc1` and `fc2`."""
    parent, _, name = module.rpartition(".")
    found = _LIST.fullmatch(name)
    return None if found is None else (parent, found["stem"])


def _above(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, without the whole: of `a.b.weight` `a` and `a.b`."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _note(taken: _Network, others: Sequence[_Network], unused: Sequence[str]) -> str:
    parts = []
    if others:
        other = _shortened([f"'{other.prefix.strip('.')}'" for other in others if other.prefix])
        verb = "fits" if len(others) == 1 else "fit"
        parts.append(
            f"{_below(taken)} taken; {other or 'those without'} {verb}, too: --prefix chooses"
        )
    elif taken.prefix and (unused or standing(taken.prefix)[0]):
        parts.append(f"{_below(taken)} taken")
    renamed = [
        f"'{name.removeprefix(taken.prefix)}' as '{own}'"
        for own, name in taken.names.items()
        if name is not None and name != f"{taken.prefix}{own}"
    ]
    absent = sum(name is None for name in taken.names.values())
    parts += [f"read {_shortened(renamed)}"] if renamed else []
    parts += [f"{counted(absent, 'count')} of batches absent, never read"] if absent else []
    if unused:
        names = _shortened([f"'{name}'" for name in unused])
        parts.append(f"{counted(len(unused), 'tensor')} not used: {names}")
    return "; ".join(parts)


def _below(network: _Network) -> str:
    prefix = network.prefix.strip(".")
    return f"weights below '{prefix}'" if prefix else "weights without a prefix"


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - _FIRST_FEW
    return ", ".join(text[:_LONGEST_NAME] for text in texts[:_FIRST_FEW]) + (
        f" and {more} more" if more > 0 else ""
    )
