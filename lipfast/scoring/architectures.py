"""Architectures by name: build the model that a checkpoint's metadata asks for, compile it once."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lipfast.checkpoints.metadata import Scalar, parse_value
from lipfast.errors import ArgumentError, LipfastError
from lipfast.estimators.plan import Plan
from lipfast.plan.modules import copied, evaluation_mode
from lipfast.plan.record import Record, record, resized
from lipfast.plan.trace import trace
from lipfast.scoring.budget import BudgetError, ElementBudget
from lipfast.text import first_line, kind_and_first_line

ArchSource: TypeAlias = "str | os.PathLike[str] | Callable[..., nn.Module] | nn.Module"
ArchArguments: TypeAlias = "tuple[tuple[str, Scalar], ...]"

_FORMS = "expected module:function (the current folder is importable) or a file model.pt2"


class ModelFamily:
    """What makes a model for a checkpoint, and the plans compiled so far.

    Args:
        source: `module:function`, a function or class that returns an `nn.Module`, a module, or a
            `.pt2` file that `torch.export.save` wrote. A function's keyword arguments are those
            metadata keys of the checkpoint that its signature names.
        overrides: keyword arguments that go before the metadata; text is parsed.

    Raises:
        ArgumentError: it cannot be imported or read, or an override is not one of its parameters.

    Example:
        >>> def mlp(width: int) -> nn.Module:
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        >>> architecture = ModelFamily(mlp)
        >>> architecture.arguments({"width": 8, "lr": 0.1})
        (('width', 8),)
        >>> architecture.plan((("width", 8),), torch.zeros(2, 4)).parameters["0.weight"]
        (8, 4)
    """

    def __init__(self, source: ArchSource, overrides: Mapping[str, Scalar] | None = None) -> None:
        self.name = _source_name(source)
        self._program = _load_program(source)
        self._make: Callable[..., nn.Module] | nn.Module = (
            nn.Identity() if self._program is not None else _resolve(source)
        )
        self._parameters, self._takes_others = _keywords(self._make)
        self._overrides = {
            key: parse_value(value) if isinstance(value, str) else value
            for key, value in (overrides or {}).items()
        }
        self._check_overrides()
        self._plans: dict[ArchArguments, Plan | LipfastError] = {}
        self._traced: dict[Record, Plan] = {}
        self.compiled = 0

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, where an exported program says it."""
        if self._program is None:
            return None
        (values, _) = self._program.example_inputs
        return tuple(values[0].shape[1:]) if len(values) == 1 else None

    def arguments(self, metadata: Mapping[str, Scalar]) -> ArchArguments:
        """Return the keyword arguments for a checkpoint with this metadata, sorted by name.

        Raises:
            ArgumentError: a keyword without a default is neither in the metadata nor given; names
                the keyword and the metadata's keys.
        """
        chosen = dict(self._overrides)
        for name, (kind, required) in self._parameters.items():
            if name in chosen or name in metadata:
                value = chosen[name] if name in chosen else metadata[name]
                chosen[name] = _as_annotated(value, kind, name)
            elif required:
                raise ArgumentError(
                    f"'{self.name}' needs the keyword '{name}', which is not in the checkpoint's "
                    f"metadata (its keys: {', '.join(sorted(metadata)) or 'none'}). Give it with "
                    f"--arch-arg {name}=VALUE"
                )
        return tuple(sorted(chosen.items()))

    def plan(self, arguments: ArchArguments, x: Tensor, elements: int | None = None) -> Plan:
        """Return the plan of the model with these arguments, compiled at the first call.

        Args:
            arguments: as `arguments` returns them.
            x: samples; the first two serve as the example input.
            elements: how many the model may create; None for any number.

        Raises:
            ArgumentError: the model cannot be made, or cannot be evaluated on the samples.
            LipfastError: the model cannot be compiled.
        """
        plan = self._plans.get(arguments)
        if plan is None:
            try:
                plan = self._compile(arguments, x, elements)
                self.compiled += 1
            except BudgetError:
                raise  # of this checkpoint: a larger one with the same metadata may be right
            except LipfastError as error:
                plan = error
            self._plans[arguments] = plan
        if isinstance(plan, LipfastError):
            raise plan.with_traceback(None)
        return plan

    def model(self, arguments: ArchArguments, elements: int | None = None) -> nn.Module:
        """Build the model, in eval mode; its weights are whatever the function gives them.

        Args:
            arguments: as `arguments` returns them.
            elements: how many it may create; None for any number.

        Raises:
            ArgumentError: the function raised an error, or returned something else.
        """
        if isinstance(self._make, nn.Module):
            return self._make.eval()
        call = f"{self.name}({', '.join(f'{k}={v!r}' for k, v in arguments)})"
        try:
            with (
                _current_folder_importable(),
                torch.random.fork_rng(devices=[]),
                nullcontext() if elements is None else ElementBudget(elements),
            ):
                model: Any = self._make(**dict(arguments))
        except BudgetError as error:
            raise BudgetError(f"{call}: {error}") from error
        except (Exception, SystemExit) as error:  # the user's code can fail in any way
            raise ArgumentError(f"{call} raised {kind_and_first_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{call} returned a {type(model).__name__}, not an nn.Module")
        return model.eval()

    def _compile(self, arguments: ArchArguments, x: Tensor, elements: int | None) -> Plan:
        if self._program is not None:
            plan = Plan.trace(self._program)
            self._check_shape(plan.input_shapes, x)
            return plan
        self._require_moderate(arguments, elements)
        model = self.model(arguments, elements)
        example = x[:2].to(_dtype(model))
        try:
            with evaluation_mode(model):  # a cached weight would be a constant of the trace
                calls = record(model, (example,))
        except Exception as error:  # shapes that do not fit show in many ways
            raise ArgumentError(
                f"'{self.name}' cannot be evaluated on samples of shape {tuple(x.shape[1:])}: "
                f"{first_line(error)}. Check the data's shape and the architecture's arguments"
            ) from error
        # The same calls with other sizes: the plan that is there needs other shapes only.
        if calls is not None and calls in self._traced:
            other = resized(self._traced[calls], model)
            if other is not None:
                return other
        plan = Plan.of(trace(model, example, fresh=self.name))
        if calls is not None:
            self._traced[calls] = plan
        return plan

    def _require_moderate(self, arguments: ArchArguments, elements: int | None) -> None:
        """Refuse integers that no size of the checkpoint's model can be: lists of that length."""
        for name, value in arguments:
            if name in self._overrides or elements is None or not isinstance(value, int):
                continue
            if abs(value) > elements:
                raise BudgetError(
                    f"'{self.name}': the metadata has {name}={value}, far beyond what the "
                    f"checkpoint can hold. Override it with --arch-arg {name}=VALUE"
                )

    def _check_shape(self, shapes: Sequence[Sequence[int]], x: Tensor) -> None:
        if [tuple(shape) for shape in shapes] != [tuple(x.shape[1:])]:
            expected = " and ".join(str(tuple(shape)) for shape in shapes)
            raise ArgumentError(
                f"'{self.name}' takes samples of shape {expected}, the data has "
                f"{tuple(x.shape[1:])}. Check the data's shape"
            )

    def _check_overrides(self) -> None:
        unknown = sorted(set(self._overrides) - set(self._parameters))
        if unknown and not self._takes_others:
            raise ArgumentError(
                f"'{self.name}' has no parameter {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(self._parameters) or 'none'}"
            )


def parse_arguments(texts: Sequence[str]) -> dict[str, Scalar]:
    """Parse `key=value` texts; numbers and booleans become such.

    Raises:
        ArgumentError: a text has no `=`.

    Example:
        >>> parse_arguments(["width=64", "bias=false", "activation=relu"])
        {'width': 64, 'bias': False, 'activation': 'relu'}
    """
    found: dict[str, Scalar] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip()):
            raise ArgumentError(f"--arch-arg '{text}': expected key=value")
        found[key.strip()] = parse_value(value)
    return found


def _source_name(source: ArchSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, nn.Module):
        return type(source).__name__
    module, name = getattr(source, "__module__", ""), getattr(source, "__qualname__", repr(source))
    return f"{module}:{name}"


def _load_program(source: ArchSource) -> torch.export.ExportedProgram | None:
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(source)
    if path.suffix != ".pt2":
        return None
    if not path.is_file():
        raise ArgumentError(f"architecture '{path}': no such file")
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive can fail in any way
        raise ArgumentError(
            f"architecture '{path}' is not what torch.export.save writes: {error}"
        ) from error


def _resolve(source: ArchSource) -> Callable[..., nn.Module] | nn.Module:
    if isinstance(source, nn.Module):
        return copied(source)  # the user's stays as it is: in its mode, with its statistics
    if not isinstance(source, (str, os.PathLike)):
        if not callable(source):
            raise ArgumentError(f"architecture {source!r}: {_FORMS}")
        return source
    module_name, colon, attribute = os.fspath(source).partition(":")
    if not (module_name and colon and attribute):
        raise ArgumentError(f"architecture '{source}': {_FORMS}")
    if module_name.endswith(".py") or "/" in module_name:
        name = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ArgumentError(
            f"architecture '{source}': name the module, not its file: '{name}:{attribute}', from "
            "the folder in which that can be imported"
        )
    found: Any
    try:
        with _current_folder_importable():
            found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module can fail in any way
        raise ArgumentError(
            f"architecture '{source}': importing '{module_name}' raised "
            f"{kind_and_first_line(error)}. {_FORMS.capitalize()}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(
                f"architecture '{source}': '{module_name}' has no '{attribute}'; its own functions "
                f"and classes are {_own_callables(found) or 'none'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"architecture '{source}' is a {type(found).__name__}, not a function")
    return typing.cast("Callable[..., nn.Module]", found)


def _own_callables(module: Any) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", None) == getattr(module, "__name__", "")
        and not name.startswith("_")
    ]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _keywords(
    make: Callable[..., nn.Module] | nn.Module,
) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """Each keyword's annotation and whether it must be given; whether any other one is taken."""
    if isinstance(make, nn.Module):  # made already
        return {}, False
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # there is none to see
        return {}, True
    try:
        hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    except Exception:  # annotations may name what is not importable at run time
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        one.name: (hints.get(one.name), one.default is inspect.Parameter.empty)
        for one in parameters
        if one.kind in named
    }, any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def _as_annotated(value: Scalar, annotation: Any, name: str) -> Scalar:
    """Give a value the type that the signature names, where that loses nothing."""
    if annotation is str and not isinstance(value, str):
        return str(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if annotation is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if annotation in (int, float) and not isinstance(value, (int, annotation)):
        raise ArgumentError(
            f"the keyword '{name}' is {value!r}, expected {annotation.__name__}. Override it with "
            f"--arch-arg {name}=VALUE"
        )
    return value


def _dtype(model: nn.Module) -> torch.dtype:
    tensors = [*model.parameters(), *model.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
