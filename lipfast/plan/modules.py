"""What a module is while it is traced or evaluated, and what is kept of it."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipfast.errors import ArgumentError
from lipfast.ops.restoring import Modes, Restoring
from lipfast.plan.kept import Kept
from lipfast.plan.untraceable import is_users

# Wrappers that compute what the module inside computes, and where that is. Subclasses may do more;
# torch's compiler is not imported for its class.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
_NO_CODE = compile("", "<string>", "exec")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel or `torch.compile`.

    Raises:
        ArgumentError: the wrapper has hooks, or a forward of its own, which would be lost.
    """
    while True:
        kind = type(model)
        attribute = _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if attribute is None:
            return model
        table = vars(model)
        forward = table.get("forward")  # torch.compile always sets one
        own = forward is not None and is_users(getattr(forward, "__code__", _NO_CODE).co_filename)
        if own or _has_hooks(model):
            raise ArgumentError(
                f"the {kind.__name__} around the model has {'a forward' if own else 'hooks'} of "
                "its own, which change what it computes: give the module inside "
                f"(model.{attribute}), with these registered there"
            )
        model = getattr(model, attribute)


def _has_hooks(model: nn.Module) -> bool:
    of_all = nn.modules.module
    return any(
        (
            *(model._forward_hooks, model._forward_pre_hooks),
            *(of_all._global_forward_hooks, of_all._global_forward_pre_hooks),
        )
    )


@dataclass
class _Visits:
    """Who may evaluate a module, and whether that moves the generators of Python and numpy.

    Reading these takes longer than evaluating a small model, so it is found out once.
    """

    module: weakref.ref[nn.Module]
    lock: threading.RLock = field(default_factory=threading.RLock)
    draws: bool = True
    kept: Kept | None = None  # of the evaluation around this one


_VISITS: dict[int, _Visits] = {}  # by the id of the module, which may be given again
_NEW_VISITS = threading.Lock()


class _FirstEvaluation:
    """What a module and the process were before, and how they are put back."""

    def __init__(self, model: nn.Module, visits: _Visits) -> None:
        self._model, self._visits = model, visits
        self._modules = _modules_of(model)
        self._flags = [module.training for module in self._modules]
        self._compiled = [vars(module).get("_compiled_call_impl") for module in self._modules]
        self._modes = Modes()
        self._kept: Kept | None = None
        self.finished = False

    def begin(self) -> Kept:
        for module, flag, compiled in zip(self._modules, self._flags, self._compiled, strict=True):
            if flag:
                _set_training(module, False)
            if compiled is not None:
                module._compiled_call_impl = None
        self._visits.kept = self._kept = kept = Kept(self._model, self._modules)
        if self._visits.draws:
            kept.keep_generators()
        return kept

    def put_back(self) -> None:
        visits, kept = self._visits, self._kept
        visits.kept = None
        try:
            if kept is not None:
                kept.restore()
                drew = kept.restore_generators()
                visits.draws = drew or (visits.draws and not self.finished)
        finally:
            for module, flag, compiled in zip(
                self._modules, self._flags, self._compiled, strict=True
            ):
                # Restoring may have been interrupted where a module had no attributes.
                if getattr(module, "training", flag) is not flag:
                    _set_training(module, flag)
                if compiled is not None:
                    module._compiled_call_impl = compiled
            self._modes.restore()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Kept]:
    """Every submodule in eval mode and uncompiled inside, exactly as it was afterwards.

    Afterwards holds after errors and Ctrl-C, too, and for all that the module holds: see `Kept`.
    Flags are set directly: `Module.train` may be overridden to do more. Random number generators
    and `Modes` are put back as well. Of several threads with the same module, one is inside at a
    time; one evaluation inside another finds the module as the outer one did.

    Returns:
        What is kept, with the module in eval mode: it can be put back and asked in between.
    """
    visits = _visits_of(model)
    with visits.lock:
        outer = visits.kept
        if outer is not None:
            outer.restore()  # what is kept of it then holds here, too: no other copy is needed
            undo = Restoring(outer.restore)
            with undo, undo, undo:
                yield outer
            return
        evaluation = _FirstEvaluation(model, visits)
        undo = Restoring(evaluation.put_back)
        with undo, undo, undo:
            yield evaluation.begin()
            evaluation.finished = True


def lock_of(model: nn.Module) -> threading.RLock:
    """What to hold while a module's state is read: an evaluation puts other tensors in its place.

    Inside `evaluation_mode` it is held.
    """
    return _visits_of(model).lock


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a module that holds results of autograd: those without their graph."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # of results of autograd; to look for them takes another copy
        computed = Kept(model, _modules_of(model)).computed()
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def _set_training(module: nn.Module, flag: bool) -> None:
    if "training" in vars(module):
        vars(module)["training"] = flag
    else:  # of a script module, for instance
        module.training = flag


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())`, in a fraction of the time."""
    found = {id(model): model}
    pending = [model]
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                pending.append(child)
    return list(found.values())


def _visits_of(model: nn.Module) -> _Visits:
    with _NEW_VISITS:
        found = _VISITS.get(id(model))
        if found is None or found.module() is not model:
            key = id(model)
            found = _Visits(weakref.ref(model, lambda reference: _forget(key, reference)))
            _VISITS[key] = found
        return found


def _forget(key: int, reference: weakref.ref[nn.Module]) -> None:
    if key in _VISITS and _VISITS[key].module is reference:
        del _VISITS[key]


_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def require_floating_modules(model: nn.Module) -> None:
    """Check that a model computes with floating numbers that are there.

    Raises:
        ArgumentError: a module has quantised weights, or parameters that take shape later; says
            which.
    """
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if kind.startswith(_QUANTIZED):
            raise ArgumentError(
                f"module '{name}' ({kind}) computes with quantised weights, a step function of its "
                "inputs that has no Jacobian and no useful Lipschitz constant: give the model from "
                "before quantisation, or one with the dequantised weights in floating layers"
            )
        for own, value in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
                path = f"{name}.{own}" if name else own
                raise ArgumentError(
                    f"parameter '{path}' is not initialised: call the model once first"
                )


def named_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which may hold other things (extra state, packed weights)."""
    return {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}


def shapes_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(state_dict).items()}


def aliases_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Name -> other names of the same tensor, from a state dict with `keep_vars=True`."""
    groups: dict[int, list[str]] = {}
    for name, value in named_tensors(state_dict).items():
        groups.setdefault(id(value), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }
