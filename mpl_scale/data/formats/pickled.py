"""Plain data out of a pickle: Python's unpickler, allowed only the opcodes and the names that CIFAR's batches need.

A pickle is a program that imports and calls what it names; here each allowed name stands for a function of this file.
This is the unpickler that pickle has in Python: the one in C allocates whatever size a file mentions before it reads,
and its opcodes cannot be restricted.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from mpl_scale.data.index.format import MalformedShard

_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "READONLY_BUFFER", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
)


def read_pickle(content: bytes) -> Any:
    """The pickled data: a dict with keys of text, list, tuple, int, float, str, bytes, None, bool or uint8 array.

    Text of Python 2 (`str`) comes as str of the same code points. Arrays are read at the top and as values of the dict.

    Raises:
        MalformedShard: not a pickle, or one that does more than hold data.
    """
    stream = io.BytesIO(content)
    try:
        found = _Unpickler(stream, size=len(content)).load()
        if stream.tell() != len(content):
            raise MalformedShard(f"{len(content) - stream.tell()} bytes after its end, as of a second pickle")
    except MalformedShard as error:
        raise MalformedShard(str(error), offset=stream.tell()) from error
    except Exception as error:  # of any kind, says pickle's documentation
        reason = str(error)[:200] or type(error).__name__
        raise MalformedShard(f"it cannot be unpickled: {reason}", offset=stream.tell()) from error
    return {key: _values(value) for key, value in found.items()} if isinstance(found, dict) else _values(found)


class _Array:
    """An array under construction. values: uint8, in the pickled shape; None until the pickle gives them."""

    values: np.ndarray | None = None


class _DType:
    """uint8, as no other is accepted."""


def _values(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value


def _dtype(code: str | bytes, *options: Any) -> _DType:
    if code not in ("u1", b"u1"):
        raise MalformedShard("an array of another type than uint8")
    return _DType()


def _build(unpickler: Any) -> None:
    """BUILD, for arrays and dtypes only: Python's own sets attributes of whatever is on the stack."""
    state = unpickler.stack.pop()
    target = unpickler.stack[-1]
    if isinstance(target, _Array):
        target.values = unpickler.array(state)
    elif not isinstance(target, _DType):
        raise MalformedShard("the pickle sets the state of an object: more than data")


def _bytearray(unpickler: Any) -> None:
    """BYTEARRAY8, of protocol 5, as bytes: Python's own allocates whatever size is named."""
    size = int.from_bytes(unpickler.read(8), "little")
    if size > unpickler.size:
        raise MalformedShard("it ends inside an array")
    unpickler.append(unpickler.read(size))


def _refuse(unpickler: Any) -> None:
    raise MalformedShard("the pickle uses an opcode that does more than hold data")


def _with_text_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The opcode, after a look at the keys on the stack: hashing nested tuples overflows C's stack, or never ends."""
    load: Callable[[Any], None] = pickle._Unpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        if not all(isinstance(key, str | bytes) for key in unpickler.stack[keys]):
            raise MalformedShard("a dict with keys other than text")
        named, known = unpickler.stack[keys], {}
        if opcode != pickle.DICT:
            known = unpickler.stack[-3] if opcode == pickle.SETITEM else unpickler.metastack[-1][-1]
        if len(set(named)) < len(named) or any(name in known for name in named):
            raise MalformedShard("a dict with one key twice")
        load(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """size: bytes of the pickle, which also bounds the bytes that it makes of its text."""

    dispatch = (
        dict.fromkeys(pickle._Unpickler.dispatch, _refuse)
        | {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)}
        | {
            pickle.BUILD[0]: _build,
            pickle.BYTEARRAY8[0]: _bytearray,
            pickle.DICT[0]: _with_text_keys(pickle.DICT, slice(0, None, 2)),
            pickle.SETITEM[0]: _with_text_keys(pickle.SETITEM, slice(-2, -1)),
            pickle.SETITEMS[0]: _with_text_keys(pickle.SETITEMS, slice(0, None, 2)),
        }
    )

    def __init__(self, file: io.BytesIO, *, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.size = self._left = size
        self._names: dict[str, Callable[..., Any] | None] = {
            "numpy.core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
            "numpy._core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
            "numpy.core.numeric._frombuffer": self._from_buffer,  # protocol 5
            "numpy._core.numeric._frombuffer": self._from_buffer,
            "numpy.ndarray": None,  # only an argument of _reconstruct
            "numpy.dtype": _dtype,
            "_codecs.encode": self._encode,
        }

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self._names:
            raise MalformedShard(f"the pickle names {path[:100]}: more than data")
        return self._names[path]

    def _from_buffer(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        found = _Array()
        found.values = self.array((1, shape, dtype, order != "C", buffer))
        return found

    def array(self, state: Any) -> np.ndarray:
        """numpy's state (version, shape, dtype, Fortran order, bytes) as an array."""
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _DType) or fortran:
            raise MalformedShard("an array of another type than uint8, or in Fortran order")
        if len(shape) > 8 or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            raise MalformedShard("an array without a shape, or of more than 8 dimensions")
        content = raw if isinstance(raw, bytes) else self._encode(raw, "latin1")
        if math.prod(shape) != len(content):
            raise MalformedShard(f"an array of {math.prod(shape)} values in {len(content)} bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)

    def _encode(self, text: str, codec: str) -> bytes:
        """Bytes as Python 3 writes them for Python 2."""
        if codec not in ("latin1", "latin-1"):
            raise MalformedShard(f"text in {codec[:100]}, not latin1")
        self._left -= len(text)  # else a few bytes could encode the same text again and again
        if self._left < 0:
            raise MalformedShard("the pickle makes more bytes of its text than it has")
        return text.encode("latin1")
