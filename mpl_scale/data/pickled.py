"""Data out of a pickle, without unpickling: the opcodes are read, and nothing that they name is imported or called.

A pickle is a program. Python's own machine would import and call whatever the file says, so a data set from anywhere
could run anything. Here the few opcodes that CIFAR-10's batches are made of (dicts, lists, numbers, text, bytes and
numpy arrays of bytes, protocols 0 to 5) build plain data; any other opcode, and any other callable, is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mpl_scale.data.formats import MalformedShard


class _Name(NamedTuple):
    """A global that a pickle refers to."""

    path: str


class _Array:
    """An array under construction: what numpy's `_reconstruct` stands for."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


class _DType:
    """A dtype under construction."""

    def __init__(self, code: Any) -> None:
        self.code = code


_MARK = object()
_RECONSTRUCT = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(content: bytes) -> Any:
    """The pickled data: dict, list, tuple, int, float, str, bytes, None, bool, uint8 arrays.

    Text of Python 2 (`str`) comes as str of the same code points.

    Raises:
        MalformedShard: no pickle, or one that does more than hold data.
    """
    machine = _Machine()
    position = 0
    try:
        for opcode, argument, found in pickletools.genops(content):
            position = found or 0
            if opcode.name == "STOP":
                return machine.pop()
            machine.do(opcode.name, argument)
    except MalformedShard as error:
        raise MalformedShard(str(error), offset=position) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise MalformedShard(f"no pickle: {error}", offset=position) from error
    raise MalformedShard("no pickle: it does not end", offset=position)


class _Machine:
    """A stack and a memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def do(self, name: str, argument: Any) -> None:
        """One opcode."""
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise MalformedShard("no pickle: the stack is empty")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in _BUILDERS:
            _BUILDERS[name](self)
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        else:
            raise MalformedShard(f"the pickle uses {name}: more than data")

    def since_mark(self) -> list[Any]:
        at = len(self._stack) - 1 - next(i for i, value in enumerate(reversed(self._stack)) if value is _MARK)
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def tuple_(self) -> None:
        self._stack.append(tuple(self._marked()))

    def list_(self) -> None:
        self._stack.append(self._marked())

    def dict_(self) -> None:
        self._stack.append(_pairs(self._marked()))

    def append(self) -> None:
        value = self.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self._top(dict)[key] = value

    def set_items(self) -> None:
        pairs = _pairs(self._marked())
        self._top(dict).update(pairs)

    def name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedShard("no pickle: a name that is no text")
        self._stack.append(_Name(f"{module} {name}"))

    def reduce(self) -> None:
        arguments, callee = self.pop(), self.pop()
        path = callee.path if isinstance(callee, _Name) else type(callee).__name__
        if not isinstance(arguments, tuple):
            raise MalformedShard("no pickle: arguments that are no tuple")
        if path in _RECONSTRUCT:
            self._stack.append(_Array())
        elif path == "numpy dtype" and arguments:
            self._stack.append(_DType(arguments[0]))
        elif path == "_codecs encode" and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
            self._stack.append(_latin(arguments[0]))  # bytes, as Python 3 writes them for Python 2
        else:
            raise MalformedShard(f"the pickle calls {path[:100]}: more than data")

    def build(self) -> None:
        state = self.pop()
        target = self._stack[-1]
        if isinstance(target, _Array):
            target.value = _array(state)
            self._replace(target, target.value)
        elif not isinstance(target, _DType):
            raise MalformedShard("the pickle sets the state of an object: more than data")

    def _replace(self, old: _Array, new: np.ndarray) -> None:
        self._stack[-1] = new
        for key, value in self._memo.items():
            if value is old:
                self._memo[key] = new

    def _marked(self) -> list[Any]:
        try:
            return self.since_mark()
        except StopIteration:
            raise MalformedShard("no pickle: a mark is missing") from None

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise MalformedShard(f"no pickle: no {kind.__name__} to add to")
        return self._stack[-1]


_BUILDERS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise MalformedShard("no pickle: a key without a value")
    return dict(zip(values[::2], values[1::2], strict=True))


def _array(state: Any) -> np.ndarray:
    """numpy's state (version, shape, dtype, Fortran order, bytes) as an array, of bytes only."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise MalformedShard("an array of another kind than numpy pickles")
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _DType) or dtype.code not in ("u1", b"u1") or fortran:
        raise MalformedShard("an array of another type than uint8, or in another order")
    content = _latin(raw)
    if not isinstance(shape, tuple) or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise MalformedShard("an array without a shape")
    count = 1
    for side in shape[:8]:
        count *= side
    if len(shape) > 8 or count != len(content):
        raise MalformedShard(f"an array of {count} values in {len(content)} bytes")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _latin(text: Any) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise MalformedShard("an array without bytes")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise MalformedShard("text that is no bytes") from error
