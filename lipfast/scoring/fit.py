"""The network of a checkpoint that an architecture describes: which names are its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lipfast.checkpoints import Checkpoint
from lipfast.checkpoints.words import WRAPPERS, standing
from lipfast.errors import StateDictError
from lipfast.estimators.plan import Plan
from lipfast.plan.renamed import equivalent_names, is_counter, is_extra_state
from lipfast.scoring.unused import is_notable, require_harmless, require_whole
from lipfast.text import counted, printable

_FLAT = re.compile(r"(?:.*\.)?_?flat_param(?:_\d+)?")
_RANK_OF_AVERAGES = standing("ema")[0]
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
        StateDictError: what is not used belongs to layers of the architecture or continues them, so
            that the file's network is another, or it is a part of one; an average fits where the
            raw weights do not.
    """
    tensors = checkpoint.tensors or checkpoint.state_dict
    own, beside, levels = checkpoint.state_dict, checkpoint.beside, checkpoint.levels
    alone = prefix is None and len(tensors) == len(own)
    if not plan.parameters or (
        alone and own.keys() == plan.parameters.keys() and _is_bare(checkpoint)
    ):
        return checkpoint
    found = _networks(tensors, plan)
    if not any(network.fits for network in found):
        # perhaps every block was wrapped in DistributedDataParallel
        shorter = {_without_module(name): tensor for name, tensor in tensors.items()}
        if len(shorter) == len(tensors):
            again = _networks(shorter, plan)
            if again and (not found or again[0].fits):
                tensors, found = shorter, again
                beside = {_without_module(name): kind for name, kind in beside.items()}
                levels = frozenset(map(_without_module, levels))
    taken = _chosen_of(found, prefix)
    if taken is None:
        return _mismatching(checkpoint)
    state_dict = {name: tensors[at] for name, at in taken.names.items() if at is not None}
    if not taken.fits:  # the error of the plan says which shape is wrong
        return replace(checkpoint, state_dict=state_dict)
    others = [other for other in found if other is not taken and other.fits]
    unused = _unused(tensors, taken, others)
    if prefix is None:
        _require_no_average(taken, found)
        require_whole(taken.prefix, tensors, levels)
    chosen = prefix is not None
    require_harmless(unused, beside, taken.prefix, plan.parameters, chosen=chosen)
    unused += [name for name, kind in beside.items() if is_notable(kind)]
    return replace(checkpoint, state_dict=state_dict, note=_note(taken, others, unused))


def _is_bare(checkpoint: Checkpoint) -> bool:
    """Whether nothing lies in the one network of a file, or is to be said, beside its tensors."""
    first = next(iter(checkpoint.tensors or checkpoint.state_dict), "")
    prefix = first.removesuffix(next(iter(checkpoint.state_dict), ""))
    return not any(
        name.startswith(prefix) or is_notable(kind) for name, kind in checkpoint.beside.items()
    )


def _chosen_of(found: Sequence[_Network], prefix: str | None) -> _Network | None:
    """The network that is taken: what fits goes first, and what a user names is no other one."""
    wanted = [network for network in found if _is_wanted(network.prefix, prefix)]
    if prefix is not None:
        exact = [one for one in wanted if one.prefix.strip(".") == prefix.strip(".")]
        wanted = exact or wanted
    return next((network for network in wanted if network.fits), next(iter(wanted), None))


def _require_no_average(taken: _Network, found: Sequence[_Network]) -> None:
    """Refuse an average in the place of raw weights that have the names, but other shapes.

    Raises:
        StateDictError: says which, and what to do.
    """
    if standing(taken.prefix)[0] < _RANK_OF_AVERAGES:
        return
    owners = {name.rpartition(".")[0] for name in taken.names}
    raw = next(
        (
            one
            for one in found
            if not one.fits
            and standing(one.prefix)[0] < _RANK_OF_AVERAGES
            # names of one layer may be those of any
            and (len(owners) > 1 or one.prefix.strip(".").rpartition(".")[2] in WRAPPERS)
        ),
        None,
    )
    if raw is not None:
        raise StateDictError(
            f"{_below(taken)} are an average, and {_below(raw)}, which go before them, have other "
            f"shapes than the architecture: --prefix {printable(taken.prefix.strip('.')[:200])} "
            "takes the average"
        )


def _is_wanted(prefix: str, chosen: str | None) -> bool:
    """Whether what stands before a network's names is, or holds, what the user says."""
    if chosen is None or not chosen.strip("."):
        return chosen is None or not prefix
    return f".{chosen.strip('.')}." in f".{prefix}"


def _networks(tensors: Mapping[str, Tensor], plan: Plan) -> list[_Network]:
    """All networks with the plan's names, those of other shapes, too: the best first."""
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
    return sorted(found, key=lambda one: standing(one.prefix))


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
    renamed = equivalent_names(name) if _is_renamed(name, plan.parameters) else ()
    return (name, *plan.aliases.get(name, ()), *renamed)


def _is_renamed(name: str, known: Mapping[str, Sequence[int]]) -> bool:
    """Whether a parameter is of a kind whose names were others once, by those beside it.

    Pruning, too, calls a weight `weight_orig`, and any parametrization has an `original`: of
    spectral norm they are where its vectors are. Layer norms have one dimension.
    """
    module, dot, last = name.rpartition(".")
    if last == "original":
        return f"{module}.0._u" in known
    if last.endswith("_orig"):
        return f"{name.removesuffix('_orig')}_u" in known
    if last in ("weight", "bias"):
        return len(known.get(f"{module}{dot}weight", ())) == 1
    return True


def _without_module(name: str) -> str:
    return name.replace(".module.", ".").removeprefix("module.")


def _mismatching(checkpoint: Checkpoint) -> Checkpoint:
    """What the plan is compared with where nothing fits, so that the error says what is wrong."""
    flat = next((name for name in checkpoint.state_dict if _FLAT.fullmatch(name)), None)
    if flat is not None:
        raise StateDictError(
            f"'{printable(flat[:_LONGEST_NAME])}' holds the parameters of many layers that FSDP "
            "joined into one: save with StateDictType.FULL_STATE_DICT, or with "
            "torch.distributed.checkpoint"
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


def _above(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, without the whole: of `a.b.weight` `a` and `a.b`."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _note(taken: _Network, others: Sequence[_Network], unused: Sequence[str]) -> str:
    parts = []
    if others:
        prefixes = [other.prefix.strip(".") for other in others]
        other = _shortened([f"'{name}'" if name else "those without" for name in prefixes])
        verb = "fits" if len(others) == 1 else "fit"
        parts.append(f"{_below(taken)} taken; {other} {verb}, too: --prefix chooses")
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
    return f"weights below '{printable(prefix)}'" if prefix else "weights without a prefix"


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - _FIRST_FEW
    return ", ".join(printable(text[:_LONGEST_NAME]) for text in texts[:_FIRST_FEW]) + (
        f" and {more} more" if more > 0 else ""
    )
