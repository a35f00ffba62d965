"""Modules are the same bits after a call, whatever their forward writes, draws or raises."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import LipfastError
from lipfast.plan.modules import evaluation_mode
from tests.support.writers import WIDTH, WRITES, Writer, held, process_state

X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "compile": lambda model: lipfast.compile(model, X),
    "upper_bound": lambda model: lipfast.upper_bound(model, X, norm=1),
    "bounds": lambda model: lipfast.bounds(model, X),
    "lower_bound": lambda model: lipfast.lower_bound(model, X),
    "ascent": lambda model: lipfast.lower_bound(model, X, search="ascent", steps=2),
    "pairs": lambda model: lipfast.lower_bound(model, X, search="pairs"),
    "jacobian_norms": lambda model: lipfast.jacobian_norms(model, X),
    "known": lambda model: [lipfast.jacobian_norms(model, X) for _ in range(2)],
    "rows": lambda model: lipfast.jacobian_norms(model, X, method="rows"),
    "lanczos": lambda model: lipfast.jacobian_norms(model, X, method="lanczos"),
    "create_graph": lambda model: lipfast.jacobian_norms(model, X, create_graph=True),
    "gradients": lambda model: lipfast.input_gradient_norms(nn.Sequential(model, Sum()), X),
    "lists": lambda model: lipfast.lower_bound(model, torch.utils.data.TensorDataset(X)),
}
FEW = ("compile", "lower_bound", "known", "rows", "create_graph")


def writer(write: Callable[[Writer, Tensor], object]) -> Writer:
    torch.manual_seed(0)
    model = Writer(write)
    model.scale.grad = torch.ones(WIDTH)
    model.layer.eval()
    return model


def require_unchanged(model: nn.Module, call: Callable[[nn.Module], object]) -> None:
    before = repr((held(model), process_state()))
    with contextlib.suppress(LipfastError):
        call(model)
    assert repr((held(model), process_state())) == before


@pytest.mark.parametrize("name", WRITES)
def test_whatever_is_written_is_put_back(name: str) -> None:
    model = writer(WRITES[name])
    before = repr((held(model), process_state()))
    with evaluation_mode(model) as kept:
        assert not any(module.training for module in model.modules())
        model(X)
        assert kept.written() or name in ("generators", "gradients")
    assert repr((held(model), process_state())) == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["data of a parameter", "generators"])
def test_public_calls_leave_everything(name: str, call: Callable[[nn.Module], object]) -> None:
    require_unchanged(writer(WRITES[name]), call)


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", WRITES)
def test_all_calls_with_all_writes(name: str, call: Callable[[nn.Module], object]) -> None:
    require_unchanged(writer(WRITES[name]), call)


@pytest.mark.parametrize(
    ("error", "calls"), [(ValueError, 1), (KeyboardInterrupt, 2), (SystemExit, 5)]
)
@pytest.mark.parametrize("call", [CALLS[name] for name in FEW], ids=FEW)
def test_errors_and_interrupts(
    call: Callable[[nn.Module], object], error: type[BaseException], calls: int
) -> None:
    seen: list[int] = []

    def write(model: Writer, x: Tensor) -> None:
        model.scale.data.fill_(9.0)
        model.count += 1
        model.table["deep"]["list"].append(x)
        seen.append(1)
        if len(seen) >= calls:
            raise error("in forward")

    model = writer(write)
    before = repr((held(model), process_state()))
    with contextlib.suppress(LipfastError, ValueError, KeyboardInterrupt, SystemExit):
        call(model)
    assert repr((held(model), process_state())) == before


def test_an_interrupt_while_things_are_put_back_comes_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = writer(WRITES["copy without gradients"])
    before = repr(held(model))
    interrupted: list[int] = []

    def interrupt(original: Callable[[], None]) -> None:
        original()
        if not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt

    def evaluate() -> None:
        with evaluation_mode(model) as kept:
            model(X)
            monkeypatch.setattr(kept, "restore", partial(interrupt, kept.restore))

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert interrupted
    assert repr(held(model)) == before


@pytest.mark.parametrize("tied", ["parameter", "storage", "module"])
def test_tied_and_shared(tied: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            if tied == "parameter":
                self.second.weight = self.first.weight
            elif tied == "storage":
                self.second.weight.data = self.first.weight.data.t()
            else:
                self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            self.second.weight.data.mul_(2.0)
            result: Tensor = self.first(x)
            return result

    torch.manual_seed(0)
    model = Tied()
    before = held(model)
    for name in FEW:
        require_unchanged(model, CALLS[name])
    assert repr(held(model)) == repr(before)


def test_spectral_norm_and_observers() -> None:
    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.spectral_norm(nn.Linear(4, 3))
            self.newer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
            self.observer = torch.ao.quantization.MinMaxObserver()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.observer(self.newer(self.layer.train()(x)))
            return result

    torch.manual_seed(0)
    for name in FEW:
        require_unchanged(Observed(), CALLS[name])


def test_what_leads_to_itself_and_to_the_whole_program() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.history, self.me = model, [1], self

    class Held(nn.Linear):
        trainer: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.trainer.history.append(x)
            return super().forward(x)

    model = Held(4, 3)
    model.trainer = Trainer(model)
    lipfast.jacobian_norms(model, X)
    assert model.trainer.history == [1]


def test_threads_take_turns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).train()
    expected = lipfast.jacobian_norms(model, X)
    results: list[object] = []

    def work(method: Any) -> None:
        try:
            for _ in range(2):
                results.append(lipfast.jacobian_norms(model, X, method=method))
                lipfast.lower_bound(model, X)
                lipfast.upper_bound(model, X)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in ("auto", "rows", "auto", "rows")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert isinstance(result, Tensor), result
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    assert len(results) == 8
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore")  # torch's, of what it deprecates
def test_quantised_tensors_are_put_back() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)

        def forward(self, x: Tensor) -> Tensor:
            self.scale.copy_(torch.zeros(3))
            return 2 * x

    model = Quantised()
    assert lipfast.jacobian_norms(model, torch.ones(2, 3)).tolist() == [2.0, 2.0]
    assert model.scale.dequantize().tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_do_not_write_when_they_list_other_parameters(
    kind: type[nn.RNNBase],
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.cell(x)[0]
            return result

    model, x = Recurrent(), torch.ones(2, 4, 3)
    listed = model.cell._flat_weights
    with evaluation_mode(model) as kept:
        other = {name: value.detach().clone() for name, value in model.named_parameters()}
        torch.func.functional_call(model, other, x)
        assert model.cell._flat_weights is not listed
        assert kept.written() == {}
        model.cell.hidden_size = 5
        assert list(kept.written()) == ["attribute 'cell.hidden_size'"]
    assert model.cell._flat_weights is listed
    assert model.cell.hidden_size == 2


@pytest.mark.parametrize("write", ["entry", "shrunk"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(5000),
        lambda: torch.zeros(5001),
        lambda: torch.zeros(5001)[1:],
        lambda: torch.zeros(8, 5, 20, 20).to(memory_format=torch.channels_last),
        lambda: torch.zeros(5000, dtype=torch.bfloat16),
        lambda: torch.zeros(5001, dtype=torch.bool),
        lambda: torch.zeros(4097, dtype=torch.complex64),
        lambda: torch.zeros(4097, dtype=torch.complex128),
    ],
    ids=["even", "odd", "offset", "channels last", "half", "bytes", "complex", "wide"],
)
def test_large_tensors_are_put_back_to_their_last_entry(
    make: Callable[[], Tensor], write: str
) -> None:
    module = nn.Module()
    module.large = tensor = make()
    size = tensor.untyped_storage().nbytes()
    with evaluation_mode(module) as kept:
        if write == "entry":
            tensor.data[(-1,) * tensor.dim()] = 1
        else:
            tensor.untyped_storage().resize_(0)
        assert kept.rewritten()
    assert tensor.untyped_storage().nbytes() == size
    assert not tensor.any()


@pytest.mark.parametrize("size", [0, 8])
def test_tensors_without_memory_are_left_without(size: int) -> None:
    """A storage of parameters that are gathered when they are needed is emptied in between."""
    module = nn.Module()
    module.emptied = torch.zeros(5000)
    module.emptied.untyped_storage().resize_(size)
    with evaluation_mode(module):
        module.emptied.untyped_storage().resize_(20000)
        module.emptied.fill_(1.0)
    assert module.emptied.untyped_storage().nbytes() == size
    with evaluation_mode(module) as kept:
        assert not kept.written()
