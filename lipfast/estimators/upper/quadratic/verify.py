"""Check a certificate again, with nothing of what found it."""

from __future__ import annotations

import torch

from lipfast.errors import ArgumentError, CertificateError
from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.networks import prepared
from lipfast.estimators.upper.quadratic.certificate import QuadraticCertificate
from lipfast.estimators.upper.quadratic.chains import MatrixChain, matrix_chain
from lipfast.estimators.upper.quadratic.digest import weights_digest
from lipfast.estimators.upper.quadratic.residual_proof import scaled_blocks, why_not_positive
from lipfast.estimators.upper.sweep import ITSELF, ZERO, sweep_of
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward


@plain_arithmetic()
def verify_certificate(
    certificate: QuadraticCertificate, plan: Architecture, state_dict: StateDict
) -> UpperBound:
    r"""The bound, $\|f(x) - f(y)\|_2 \le L \|x - y\|_2$, that a certificate proves of a network.

    Matrices, their errors and ranges of slopes are read from the plan and the state dict, never
    from the certificate; the block tridiagonal matrix of docs/bounds.md ("Checking a certificate")
    is made of them and proved by the residual of a factor that is not trusted. The search for
    multipliers and the native proof have no part in it.

    Args:
        certificate: `UpperBound.certificate`, or `QuadraticCertificate.load` of a file.
        plan: the architecture.
        state_dict: the weights; they may be on any device, the check runs on the CPU.

    Returns:
        The bound as it is proved here: side upper, norm 2, certified. A certificate that was made
        for other weights and proves a bound of these all the same says so as `reason`.

    Raises:
        CertificateError: it does not prove a bound of this network; says why.
        ArgumentError: the plan is none.
        StateDictError, NonFiniteError: the state dict does not fit the plan.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)
        ... )
        >>> plan = lipfast.compile(model, torch.zeros(2, 2))
        >>> upper = plan.upper(model.state_dict(), method="quadratic", effort=1)
        >>> again = lipfast.verify_certificate(upper.certificate, plan, model.state_dict())
        >>> again.value == upper.value, again.certified
        (True, True)
    """
    _check_kinds(certificate, plan)
    certificate.check()
    if denormals_flushed():
        raise CertificateError(FLUSHED)
    stored = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in state_dict.items()}
    entry = resolve(plan, stored)
    chain, parameters = _named_chain(certificate, plan, entry)
    _check_shapes(certificate, chain)
    boxes = chain.boxes(plan, parameters)
    if boxes is None:
        raise CertificateError("an activation has no range of slopes: quadratic constraints fail")
    weights = [weight.double() for weight in chain.matrices(parameters)]
    last = torch.full((weights[-1].shape[0],), certificate.square, dtype=torch.float64)
    blocks = scaled_blocks(
        weights,
        chain.errors(parameters),
        [(own.means, own.products) for own in boxes],
        multipliers=[*certificate.multipliers, last],
        exponents=[*certificate.units, torch.zeros(len(last), dtype=torch.int32)],
        maps=certificate.maps,
    )
    why = blocks if isinstance(blocks, str) else why_not_positive(blocks)
    if why is not None:
        told = _made_for_others(certificate, plan, stored)
        raise CertificateError(f"not proved: {why}" + (f" ({told})" if told else ""))
    total = _proved_bound(certificate, chain, plan, parameters)
    return UpperBound(
        value=total.value,
        log_value=total.log,
        side="upper",
        norm=2,
        method="quadratic constraints",
        certified=True,
        reason=_made_for_others(certificate, plan, stored),
        given=plan.rules_given,
        certificate=certificate,
    )


def _check_kinds(certificate: object, plan: object) -> None:
    if not isinstance(certificate, QuadraticCertificate):
        kind = type(certificate).__name__
        raise CertificateError(f"expected a certificate (QuadraticCertificate.load), got {kind}")
    if not isinstance(plan, Architecture):
        raise ArgumentError(f"plan must be what lipfast.compile returns, not {type(plan).__name__}")


def _named_chain(
    certificate: QuadraticCertificate, plan: Architecture, entry: dict[str, torch.Tensor]
) -> tuple[MatrixChain, dict[str, torch.Tensor]]:
    """The chain that a certificate names the matrices of: of the simplified graph, or as it is."""
    found = None
    for simplify in (True, False):
        (group,) = prepared(plan, ResolvedNetworks([entry]), simplify=simplify)
        chain = matrix_chain(sweep_of(plan, group.folded))
        if chain is None:
            continue
        found = tuple(layer.name for layer in chain.layers)
        if found == tuple(certificate.layers):
            return chain, dict(group.parameters[0])
    if found is None:
        raise CertificateError("the network is no chain of matrices with activations between")
    theirs, own = (", ".join(names)[:200] for names in (certificate.layers, found))
    raise CertificateError(f"a certificate of another architecture: of {theirs}, not of {own}")


def _check_shapes(certificate: QuadraticCertificate, chain: MatrixChain) -> None:
    sizes = [(layer.output_shape[-1],) for layer in chain.layers[:-1]]
    shapes = [[tuple(t.shape) for t in own] for own in (certificate.multipliers, certificate.units)]
    if shapes != [sizes, sizes] or len(certificate.maps) != len(sizes) + 1:
        raise CertificateError(f"multipliers and units must have the shapes {sizes}: another width")


def _made_for_others(
    certificate: QuadraticCertificate, plan: Architecture, state_dict: StateDict
) -> str | None:
    """Whether a certificate says that it is of another plan or of other weights."""
    if certificate.plan not in (None, plan.fingerprint):
        return "it was made for another plan"
    if certificate.weights not in (None, weights_digest(plan, state_dict)):
        return "it was made for other weights"
    return None


def _proved_bound(
    certificate: QuadraticCertificate,
    chain: MatrixChain,
    plan: Architecture,
    parameters: dict[str, torch.Tensor],
) -> Upward:
    root = Upward.of(certificate.square).square_root()
    total = Upward(root.mantissa, root.exponent + sum(certificate.maps))
    if chain.last is None:
        return total
    others = [ZERO if name is None else ITSELF for name in chain.last.names]
    return total * chain.last.bound(chain.last.call(others, (), parameters, plan.constants, 2))
