"""Plans: an architecture traced once, with the bounds of any number of its state dicts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, overload

from torch import Tensor
from typing_extensions import Unpack

from lipfast.errors import ArgumentError, TraceError
from lipfast.estimators.both_bounds import bounds_from
from lipfast.estimators.domain import Domain
from lipfast.estimators.lower.many_networks import lower_bounds
from lipfast.estimators.options import (
    BoundsOptions,
    LowerOptions,
    ProductOptions,
    UpperMethod,
    check_options,
    refuse,
    upper_step,
)
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import Bounds, LowerBound, UpperBound
from lipfast.estimators.samples import Data, read_samples
from lipfast.estimators.upper.spectral_product import product_bounds
from lipfast.estimators.upper.starts import Starts, StartVectors
from lipfast.estimators.upper.tracker import Tracker
from lipfast.norms import AnyNorm
from lipfast.plan.architecture import SCHEMA_VERSION, Architecture, architecture_from_json
from lipfast.plan.checked import (
    CheckedStateDict,
    StateDict,
    resolve,
    resolve_all,
)
from lipfast.plan.compositions import by_their_rules
from lipfast.plan.trace import Source, trace
from lipfast.rules.registry import require_rules


class Plan(Architecture):
    """An architecture as a graph of nodes with rules; holds no weights.

    Made by `lipfast.compile` or `Plan.load`. A plan is immutable, becomes JSON, and evaluates any
    number of state dicts in one call.

    Attributes:
        graph: nodes in topological order.
        parameters: name -> shape: what a state dict must hold.
        aliases: name -> other names of the same tensor (tied weights).
        constants: small tensors that belong to the architecture.
        dtype: floating dtype of the input that it was traced with.
        computed: nodes on parameters and constants only (weight norm, masks, class tokens): their
            results are computed once per state dict and count as parameters.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> plan = lipfast.compile(model, torch.zeros(2, 3))
        >>> plan.input_shapes, plan.output_shapes, dict(plan.parameters)
        (((3,),), ((4,),), {'0.weight': (4, 3), '0.bias': (4,)})
    """

    @classmethod
    def of(cls, architecture: Architecture) -> Plan:
        """The plan of a traced architecture."""
        return cls(*(getattr(architecture, field.name) for field in fields(architecture)))

    @classmethod
    def trace(cls, model: Source, example_input: Tensor | Sequence[Tensor] | None = None) -> Plan:
        """Trace a model; see `lipfast.compile`."""
        return cls.of(trace(model, example_input, fresh=type(model).__name__))

    def check(self, state_dict: StateDict) -> None:
        """Check that a state dict fits: names, shapes, floating dtypes, finite entries.

        Names may carry the prefixes that DataParallel and `torch.compile` add. Tied weights may
        be stored once.

        Raises:
            StateDictError: names the parameter and both shapes.
            NonFiniteError: names the parameter and says how many entries. Masks that are added to
                activations may hold -inf, as long as every softmax keeps an entry.
        """
        self.resolve(state_dict)

    def resolve(self, state_dict: StateDict, where: str = "") -> dict[str, Tensor]:
        """`check`, and the tensors under the plan's own names."""
        return resolve(self, state_dict, where)

    def resolve_all(self, state_dicts: StateDict | Sequence[StateDict]) -> list[dict[str, Tensor]]:
        """`resolve` one or many state dicts; errors say which entry of a list."""
        return list(resolve_all(self, state_dicts))

    def checked(self, state_dicts: Sequence[StateDict]) -> list[CheckedStateDict]:
        """Check state dicts once for several bounds; until then their tensors must not change.

        Raises:
            StateDictError, NonFiniteError: one does not fit; says which.
        """
        return [CheckedStateDict(entry, self) for entry in resolve_all(self, state_dicts)]

    @overload
    def upper(
        self,
        state_dicts: StateDict,
        *,
        start: StartVectors | None = None,
        **options: Unpack[ProductOptions],
    ) -> UpperBound: ...
    @overload
    def upper(
        self,
        state_dicts: Sequence[StateDict],
        *,
        start: Starts = None,
        **options: Unpack[ProductOptions],
    ) -> list[UpperBound]: ...
    def upper(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        *,
        norm: AnyNorm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        start: Starts = None,
        simplify: bool = True,
        domain: Domain | None = None,
        method: UpperMethod = "product",
        effort: int = 2,
        memory: int = 1 << 30,
        progress: bool | None = None,
        **_elsewhere: NoReturn,
    ) -> UpperBound | list[UpperBound]:
        """Certified upper bounds on the Lipschitz constant; see `spectral_product.product_bounds`.

        Args:
            state_dicts: one state dict, or a list of them, perhaps stacked
                (`lipfast.plan.stacked.StackedStateDicts`); all layers of all are one native call.
            norm: 1, 2 or inf, of inputs and outputs alike.
            rtol: relative gap of each layer's bracket.
            seed: of the start vectors.
            start: start vectors by the name of the weight, for instance `Tracker.vectors`: one
                mapping for all state dicts, or a list with one (or None) for each. The bounds are
                certified whatever they are.
            simplify: fold BatchNorm into its neighbours and merge affine maps that follow one
                another; False gives the published product, layer by layer.
            domain: `lipfast.Box` or `lipfast.Ball`: the bound holds for pairs of inputs in it;
                without one for all inputs. On the CPU, slopes that activations cannot have there
                make it smaller in norms 1 and inf, and with method="quadratic".
            method: "quadratic" also bounds by quadratic constraints on slopes, and takes the
                smaller of both bounds, in norm 2. (On the CPU and with a domain chains in norms 1
                and inf as well, one search for each output or input.) Chains of matrices and
                entrywise ops are quick, on a device all together, and `UpperBound.certificate` is
                what proves theirs, but for a domain; of other graphs (sums of branches, small
                convolutions, max pools) one matrix holds all that is alive.
            effort: how long that searches: 1 (4 to 30 products for most networks), 2 or 3. Other
                graphs than chains have the product of norms, with the reason, where one network
                would take more than about 15 s, 40 s or seven minutes of one core.
            memory: bytes that all such matrices of one network may take together, and those of a
                batch of chains on a device; where they do not fit, the product of norms is what
                there is, with the reason. That takes what the sizes of the layers ask for, whatever
                it is.
            progress: None shows it on a terminal after two seconds, False never, True from the
                start and everywhere.

        Returns:
            One `UpperBound`, or a list in the order of the state dicts.

        Raises:
            StateDictError, NonFiniteError: a state dict does not fit the architecture.
            ArgumentError: a start vector does not fit it, or an option has no meaning here; says
                where it has one.

        Examples:
            >>> import torch, lipfast
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
            >>> plan = lipfast.compile(model, torch.zeros(2, 2))
            >>> weights = {"0.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
            >>> round(plan.upper(weights).value, 5)  # at most 1e-6 above, relative
            4.0
            >>> model = torch.nn.Sequential(*model, torch.nn.Linear(2, 1, bias=False))
            >>> plan, weights = lipfast.compile(model, torch.zeros(2, 2)), dict(weights)
            >>> weights["2.weight"] = torch.tensor([[1.0, -1.0]])
            >>> both = plan.upper(weights), plan.upper(weights, method="quadratic")
            >>> [round(bound.value, 3) for bound in both]
            [5.657, 5.0]
        """
        refuse("Plan.upper", _elsewhere)
        norm = check_options(norm, domain, memory, progress, shapes=self.input_shapes)
        with shown_progress(upper_step(method), None, progress):
            results, _ = product_bounds(
                self,
                state_dicts,
                norm=norm,
                rtol=rtol,
                seed=seed,
                start=start,
                simplify=simplify,
                domain=domain,
                method=method,
                effort=effort,
                memory=int(memory),
            )
        return results[0] if isinstance(state_dicts, Mapping) else results

    def tracker(
        self,
        *,
        norm: AnyNorm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        domain: Domain | None = None,
        method: UpperMethod = "product",
        effort: int = 2,
        memory: int = 1 << 30,
        progress: bool | None = None,
        **_elsewhere: NoReturn,
    ) -> Tracker:
        """Upper bounds along a run, each from the singular vectors before it; see `Tracker`.

        Args:
            norm: 1, 2 or inf; the same for the whole run, as everything here.
            rtol: relative gap of each layer's bracket.
            seed: of the first checkpoint's start vectors.
            domain: the bounds hold for inputs in this set, see `upper`.
            method: see `upper`; quadratic constraints start from the multipliers before.
            effort: see `upper`.
            memory: see `upper`.
            progress: see `upper`.

        Raises:
            ArgumentError: an option does not fit, or has no meaning here; says where it has one.
        """
        refuse("Plan.tracker", _elsewhere)
        norm = check_options(norm, domain, memory, progress, shapes=self.input_shapes)
        return Tracker(
            self,
            norm=norm,
            rtol=rtol,
            seed=seed,
            domain=domain,
            method=method,
            effort=effort,
            memory=int(memory),
            progress=progress,
        )

    @overload
    def lower(
        self, state_dicts: StateDict, x: Data, **options: Unpack[LowerOptions]
    ) -> LowerBound: ...
    @overload
    def lower(
        self, state_dicts: Sequence[StateDict], x: Data, **options: Unpack[LowerOptions]
    ) -> list[LowerBound]: ...
    def lower(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        x: Data,
        *,
        norm: AnyNorm = 2,
        per_sample: bool = False,
        memory: int = 1 << 30,
        domain: Domain | None = None,
        progress: bool | None = None,
        **_elsewhere: NoReturn,
    ) -> LowerBound | list[LowerBound]:
        """Lower bounds from samples; see `estimators.lower.many_networks.lower_bounds`.

        Args:
            state_dicts: one state dict, or a list of them.
            x: samples (B, D...), floating; a tuple of tensors for several inputs (there is no
                certificate then); or a Dataset or DataLoader as for `lipfast.lower_bound`, whose
                batches are read once for all state dicts.
            norm: 1, 2 or inf.
            per_sample: keep the Jacobian norm of every sample.
            memory: bytes that intermediate tensors may take.
            domain: `lipfast.Box` or `lipfast.Ball`: the certified difference quotient is of two
                points in this set. The Jacobian norms are of the samples as they are.
            progress: see `upper`.

        Returns:
            One `LowerBound`, or a list in the order of the state dicts.

        Raises:
            ArgumentError, NonFiniteError: the samples do not fit, or hold NaN or Inf.
            ArgumentError: an option has no meaning here; says where it has one.
            StateDictError, NonFiniteError: a state dict does not fit the architecture.

        Examples:
            >>> import torch, lipfast
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
            >>> plan = lipfast.compile(model, torch.zeros(2, 2))
            >>> weights = {"0.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
            >>> lower = plan.lower(weights, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
            >>> round(lower.value, 6), lower.sample, lower.certified
            (4.0, 1, True)
        """
        refuse("Plan.lower", _elsewhere)
        norm = check_options(norm, domain, memory, progress, shapes=self.input_shapes)
        with read_samples(x, shapes=self.input_shapes, whole=True, later=True) as samples:
            results = lower_bounds(
                self,
                state_dicts,
                samples,
                norm=norm,
                per_sample=per_sample,
                memory=memory,
                domain=domain,
                progress=progress,
            )
        return results[0] if isinstance(state_dicts, Mapping) else results

    @overload
    def bounds(
        self, state_dicts: StateDict, x: Data, **options: Unpack[BoundsOptions]
    ) -> Bounds: ...
    @overload
    def bounds(
        self, state_dicts: Sequence[StateDict], x: Data, **options: Unpack[BoundsOptions]
    ) -> list[Bounds]: ...
    def bounds(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        x: Data,
        *,
        norm: AnyNorm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        per_sample: bool = False,
        memory: int = 1 << 30,
        domain: Domain | None = None,
        method: UpperMethod = "product",
        effort: int = 2,
        floor: bool = False,
        progress: bool | None = None,
        **_elsewhere: NoReturn,
    ) -> Bounds | list[Bounds]:
        """Lower and upper bounds together, with lower <= upper asserted.

        Arguments, result order and errors as for `upper` and `lower`. With `floor` also the largest
        norm that slopes make is searched for, `Bounds.floor` (as long as `effort` says): no method
        that ignores which slopes inputs can reach proves less.

        Raises:
            BoundOrderError: a certified lower bound exceeds a certified upper bound (a defect).
        """
        refuse("Plan.bounds", _elsewhere)
        norm = check_options(norm, domain, memory, progress, shapes=self.input_shapes)
        with read_samples(x, shapes=self.input_shapes, whole=True, later=True) as samples:
            results = bounds_from(
                self,
                state_dicts,
                samples,
                norm=norm,
                rtol=rtol,
                seed=seed,
                per_sample=per_sample,
                memory=memory,
                domain=domain,
                method=method,
                effort=effort,
                floor=floor,
                progress=progress,
            )
        return results[0] if isinstance(state_dicts, Mapping) else results

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (no weights)."""
        _plan_file(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            TraceError: the file is missing, is not a plan, or has an unknown schema version.
            UnsupportedOpError: it needs rules that are not registered here.
            ArgumentError: `path` is none.
        """
        file = _plan_file(path)
        try:
            value = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise TraceError(f"{path}: cannot read a plan: {error}") from error
        if not isinstance(value, dict) or "lipfast_plan" not in value:
            raise TraceError(f"{path}: not a lipfast plan")
        if value["lipfast_plan"] != SCHEMA_VERSION:
            raise TraceError(
                f"{path}: plan of schema version {value['lipfast_plan']}; this lipfast reads "
                f"version {SCHEMA_VERSION}. Trace the model again."
            )
        try:
            plan = Plan.of(architecture_from_json(value))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TraceError(f"{path}: damaged plan: {error!r}") from error
        require_rules(by_their_rules(plan.graph))
        return plan


def _plan_file(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"path must be a str or an os.PathLike, not {type(path).__name__}")
    return Path(path)
