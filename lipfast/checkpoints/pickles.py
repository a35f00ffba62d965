"""Read a pickle without running it.

A pickle is a program: it imports names and calls them. Here nothing is imported and nothing of the
file is called. Names stay names, calls of a few known ones give plain values (`values`, `tensors`),
and every other object is a `StandIn`. Each operation costs a bounded time and memory, so that both
are in proportion to the file's length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from lipfast.checkpoints.stand_ins import (
    Global,
    MoreThanWeightsError,
    StandIn,
    UnsafePickleError,
)

Maker = Callable[..., Any]

_MAX_OPERATIONS = 2_000_000
_MAX_TENSORS = 100_000
_MAX_KEY = 1 << 24  # integers beyond it can be chosen to collide in a dict
_MAX_KEY_ITEMS = 8
_MAX_NAME = 1024  # characters; of names of classes, and of keys that cost nothing
_RUNS_CODE = {
    *("os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "pty", "ctypes"),
    *("webbrowser", "pdb", "bdb", "marshal", "pickle", "_pickle", "importlib.import_module"),
    *(f"builtins.{name}" for name in ("eval", "exec", "execfile", "compile", "open", "breakpoint")),
    "builtins.__import__",
}
"""Modules and functions that no checkpoint needs and attacks do: to name them is to be refused."""


class Allowance:
    """What the pickles of one file may still take.

    Args:
        length: of the file, in bytes.
    """

    def __init__(self, length: int) -> None:
        self.operations = 0
        self.tensors = 0
        self._left = 4 * length + (1 << 20)

    def spend(self, count: int) -> None:
        """Take bytes or entries that are copied from what the file's length allows.

        Raises:
            UnsafePickleError: nothing is left: one object is copied over and over.
        """
        self._left -= count
        if self._left < 0:
            raise UnsafePickleError("its pickle copies one object over and over")

    def count_tensor(self) -> None:
        """Count one more tensor.

        Raises:
            UnsafePickleError: there are too many.
        """
        self.tensors += 1
        if self.tensors > _MAX_TENSORS:
            raise UnsafePickleError(f"its pickle makes more than {_MAX_TENSORS} tensors")


class PickleReader:
    """Reads pickles.

    Args:
        calls: known names, as `module.name`, to what makes their value: called with the reader and
            the arguments.
        persistent: makes the value of a persistent id.
        allowance: of the file that they are in.

    Attributes:
        foreign: the first name that is called and not known.
    """

    def __init__(
        self, calls: Mapping[str, Maker], persistent: Callable[[Any], Any], allowance: Allowance
    ) -> None:
        self.calls = calls
        self.persistent = persistent
        self.allowance = allowance
        self.foreign: str | None = None
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def read(self, stream: IO[bytes]) -> Any:
        """Read one pickle, up to its end.

        Raises:
            UnsafePickleError: it would take memory or time out of proportion.
            MoreThanWeightsError: it was made to run code.
            Exception: it is damaged.
        """
        self.stack, self.outer, self.memo = [], [], {}
        allowance, read = self.allowance, stream.read
        code = b""
        while code != b".":
            allowance.operations += 1
            if allowance.operations > _MAX_OPERATIONS:
                raise UnsafePickleError(f"its pickle has more than {_MAX_OPERATIONS} operations")
            code = read(1)
            operation, argument = _BY_CODE.get(code, (None, None))
            if operation is None:
                raise _unknown(code)
            operation(self, argument(stream) if argument else None)
        return self.stack.pop()

    def call(self, function: object, args: object) -> Any:
        """Give what a call gives, where it is known; a stand-in elsewhere.

        Raises:
            MoreThanWeightsError: it is a call that attacks make.
        """
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        self.allowance.spend(len(args))
        if not isinstance(function, Global):
            return StandIn("a call", args)
        name = function.name
        if name in _RUNS_CODE or name.partition(".")[0] in _RUNS_CODE:
            raise MoreThanWeightsError(name)
        if name in {"copyreg.__newobj__", "copyreg._reconstructor"} and args:
            rest = args[1:] if name.endswith("__newobj__") else ()
            name, args = args[0].name if isinstance(args[0], Global) else name, rest
        known = self.calls.get(name)
        if known is not None:
            return known(self, *args)
        self.foreign = self.foreign or name
        return StandIn(name, args)

    def pop_mark(self) -> list[Any]:
        """Everything since the last mark."""
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values, one after the other, into the dict on top."""
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.items_set = {} if target.items_set is None else target.items_set
            target = target.items_set
        if isinstance(target, dict):
            target.update(zip(map(self.key, pairs[::2]), pairs[1::2], strict=True))

    def key(self, value: object) -> object:
        """A value as the key of a dict. Long texts cost: equal ones are compared sign by sign."""
        if isinstance(value, (str, bytes)) and len(value) > _MAX_NAME:
            self.allowance.spend(len(value))
        return as_key(value)

    def add_items(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if isinstance(self.stack[-1], list):
            self.stack[-1] += items

    def build(self, state: Any) -> None:
        """Give the object on top its state."""
        thing = self.stack[-1]
        if not isinstance(thing, StandIn) or thing.state is not None:
            return  # attributes of a dict or a tensor
        thing.state, thing.spend = state, self.allowance.spend
        known = self.calls.get(f"{thing.name}.__setstate__")
        if known is not None:
            self.stack[-1] = known(self, thing)
            if thing.place is not None:
                self.memo[thing.place] = self.stack[-1]

    def remember(self, index: int) -> None:
        """Keep the object on top for later."""
        thing = self.stack[-1]
        if not 0 <= index <= self.allowance.operations:  # they are counted from 0, or 1
            raise ValueError("a place in the memo that is none")
        if type(thing) is StandIn:
            thing.place = index
        self.memo[index] = thing

    def find(self, module: object, name: object) -> None:
        """Push a name, the old ones of Python 2 as they are called now."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        if len(module) + len(name) > _MAX_NAME:
            raise UnsafePickleError("its pickle names a class by thousands of characters")
        self.allowance.spend(len(module) + len(name))
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        self.stack.append(Global(f"{module.replace('numpy._core', 'numpy.core')}.{name}"))


def _unknown(code: bytes) -> Exception:
    return (
        ValueError(f"no operation of a pickle: {code!r}") if code else EOFError("it ends too early")
    )


def as_key(value: object) -> object:
    """A value as the key of a dict; what may be slow to hash, or shares one hash, gives a stand-in.

    Hashes of texts are random in each process, and so are those of tuples that begin with one;
    those of stand-ins are their identity. Floats and long integers can be chosen to have all one.

    Example:
        >>> as_key("epoch"), as_key(((), ()))
        ('epoch', <StandIn a key>)
    """
    if _is_plain(value) or isinstance(value, StandIn):
        return value
    is_short = type(value) is tuple and 0 < len(value) <= _MAX_KEY_ITEMS
    is_salted = is_short and type(value[0]) is str and all(map(_is_plain, value))  # type: ignore[index,call-overload]
    return value if is_salted else StandIn("a key")


def _is_plain(value: object) -> bool:
    if type(value) is int:
        return abs(value) < _MAX_KEY
    return value is None or type(value) in {str, bytes, bool}


def _push(reader: PickleReader, argument: Any) -> None:
    reader.stack.append(argument)


def _mark(reader: PickleReader, _: Any) -> None:
    reader.outer.append(reader.stack)
    reader.stack = []


def _pop(reader: PickleReader, _: Any) -> None:
    if reader.stack:
        reader.stack.pop()
    else:
        reader.pop_mark()


def _tuple_of(count: int) -> Maker:
    def operation(reader: PickleReader, _: Any) -> None:
        items = tuple(reader.stack[-count:])
        if len(items) < count:
            raise IndexError("a tuple of more than there is")
        reader.stack[-count:] = [items]

    return operation


def _dict(reader: PickleReader, _: Any) -> None:
    items = reader.pop_mark()
    reader.stack.append({})
    reader.set_items(items)


def _set_item(reader: PickleReader, _: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    reader.set_items([key, value])


def _name(reader: PickleReader, argument: str) -> None:
    reader.find(*argument.split(" ", 1))


def _name_on_stack(reader: PickleReader, _: Any) -> None:
    name, module = reader.stack.pop(), reader.stack.pop()
    reader.find(module, name)


def _reduce(reader: PickleReader, _: Any) -> None:
    args, function = reader.stack.pop(), reader.stack.pop()
    reader.stack.append(reader.call(function, args))


def _new_with_keywords(reader: PickleReader, _: Any) -> None:
    reader.stack.pop()
    _reduce(reader, None)


def _instance(reader: PickleReader, argument: str) -> None:
    args = reader.pop_mark()
    _name(reader, argument)
    reader.stack.append(reader.call(reader.stack.pop(), tuple(args)))


def _object(reader: PickleReader, _: Any) -> None:
    function, *args = reader.pop_mark()
    reader.stack.append(reader.call(function, tuple(args)))


_NUMBERS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_TEXTS = "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING"
_BYTES = "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"

_OPERATIONS: dict[str, Maker] = {
    **dict.fromkeys(f"{_NUMBERS} {_TEXTS} {_BYTES}".split(), _push),
    **dict.fromkeys(["PROTO", "FRAME", "STOP"], lambda reader, argument: None),
    "NONE": _push,
    "NEWTRUE": lambda reader, _: reader.stack.append(True),
    "NEWFALSE": lambda reader, _: reader.stack.append(False),
    "EMPTY_TUPLE": lambda reader, _: reader.stack.append(()),
    "EMPTY_LIST": lambda reader, _: reader.stack.append([]),
    "EMPTY_SET": lambda reader, _: reader.stack.append([]),  # of a set nothing is used
    "EMPTY_DICT": lambda reader, _: reader.stack.append({}),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda reader, _: reader.pop_mark(),
    "DUP": lambda reader, _: reader.stack.append(reader.stack[-1]),
    "TUPLE": lambda reader, _: _push(reader, tuple(reader.pop_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": lambda reader, _: _push(reader, reader.pop_mark()),
    "FROZENSET": lambda reader, _: _push(reader, reader.pop_mark()),
    "DICT": _dict,
    "APPEND": lambda reader, _: reader.add_items([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.add_items(reader.pop_mark()),
    "ADDITEMS": lambda reader, _: reader.add_items(reader.pop_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_mark()),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], PickleReader.remember),
    "MEMOIZE": lambda reader, _: reader.remember(len(reader.memo)),
    **dict.fromkeys(
        ["GET", "BINGET", "LONG_BINGET"],
        lambda reader, index: reader.stack.append(reader.memo[index]),
    ),
    "GLOBAL": _name,
    "STACK_GLOBAL": _name_on_stack,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda reader, _: reader.build(reader.stack.pop()),
    "PERSID": lambda reader, argument: reader.stack.append(reader.persistent(argument)),
    "BINPERSID": lambda reader, _: _push(reader, reader.persistent(reader.stack.pop())),
}

_BY_CODE: dict[bytes, tuple[Maker, Callable[[IO[bytes]], Any] | None]] = {
    opcode.code.encode("latin-1"): (
        _OPERATIONS[opcode.name],
        opcode.arg.reader if opcode.arg is not None else None,
    )
    for opcode in pickletools.opcodes
    if opcode.name in _OPERATIONS
}
