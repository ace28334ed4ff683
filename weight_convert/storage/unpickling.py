"""Reading pickles of strangers: nothing is executed, and large contents stay on the disk.

A pickle is a program for a small stack machine. Python's own machine imports and calls whatever
the program names; this one knows the instructions of protocols 2 to 5 that plain data needs and
calls only what its caller lists. Byte strings beyond `LAZY_FROM` bytes are not loaded: their
place in the file is noted, so that a tensor can be mapped later.

Source of the instructions: CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from weight_convert.errors import CheckpointError

LAZY_FROM = 4096
"""Strings of at least so many bytes are left in the file."""
MAX_INSTRUCTIONS = 5_000_000
"""About 100 000 tensors. One byte of a pickle can ask for 200 bytes of memory."""
MAX_LOADED_BYTES = 256 * 2**20
"""The most that is read of one pickle: everything that is not left in the file."""
MAX_INTEGER_BYTES = 32
MAX_NAME_BYTES = 512
"""Longest module or attribute name of a global."""
PROTOCOLS = range(2, 6)

_CHUNK = 2**20
_FAULTS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What a senseless program or senseless arguments raise, here and in allowed constructors."""
_KEYS = (str, int, float, bool, bytes, type(None))
"""Types of keys, integers with 64 bits. No tuples: hashing one that holds another twice, and so on
sixty times, takes for ever; so do a million large integers with the same hash."""


@dataclass(frozen=True)
class LazyBytes:
    """A string that was left in the file."""

    path: Path
    offset: int
    length: int
    """Bytes in the file."""
    kind: Literal["bytes", "text", "latin-1"] = "bytes"
    """"text": a str, as UTF-8. "latin-1": bytes that the file holds as text, one character (so
    one or two bytes of UTF-8) for each, which is how protocol 2 carries them."""

    def read(self, count: int) -> np.ndarray:
        """The contents, uint8 [count]; changes to it never reach the file.

        Raises CheckpointError if the contents are not `count` bytes, or are not bytes.
        """
        if self.kind == "text":
            raise damaged(self.path, f"text where bytes should be, at byte {self.offset}")
        if self.kind == "bytes":
            if count != self.length:
                raise self._other_size(count, self.length)
            return np.memmap(self.path, np.uint8, "c", self.offset, (count,))
        return self._decode(count)

    def _decode(self, count: int) -> np.ndarray:
        """In chunks, so that it takes the memory of the result alone."""
        if not self.length // 2 <= count <= self.length:
            raise self._other_size(count, f"{self.length // 2} to {self.length}")
        decoder = codecs.getincrementaldecoder("utf-8")()
        result = np.empty(count, np.uint8)
        filled, left = 0, self.length
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                raw = file.read(min(left, _CHUNK))
                left -= len(raw)
                try:
                    part = decoder.decode(raw, final=not left).encode("latin-1")
                except UnicodeError as error:
                    raise damaged(self.path, "bytes as text are not latin-1", error) from None
                if not raw or filled + len(part) > count:
                    raise self._other_size(count, "another number")
                result[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
        if filled != count:
            raise self._other_size(count, filled)
        return result

    def _other_size(self, expected: int, given: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: contents of another size at byte {self.offset}",
            given=f"{given} bytes",
            expected=f"{expected} bytes",
        )


class Buildable:
    """Base of placeholders that take a state (instruction BUILD, `__setstate__` in Python)."""

    def build(self, state: Any) -> None:
        """Take the state, which may be anything; raise ValueError if it is senseless."""
        raise ValueError(f"a state of type {type(state).__name__}")


# --- constructors that every caller may allow ------------------------------------------------


def make_dict() -> dict[Any, Any]:
    """`OrderedDict()`: an ordinary dict, to which the entries are added afterwards."""
    return {}


def encode_text(text: str | LazyBytes, encoding: str = "latin1") -> bytes | LazyBytes:
    """`_codecs.encode(text, "latin1")`, which is how protocol 2 carries bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes as text in {describe(encoding)}")
    if isinstance(text, LazyBytes) and text.kind == "text":
        return replace(text, kind="latin-1")
    if type(text) is not str:
        raise TypeError(f"{describe(text)} where text should be")
    return text.encode("latin-1")


def make_empty_bytes() -> bytes:
    """`bytes()`, which is how protocol 2 carries empty bytes."""
    return b""


PLAIN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): make_dict,
    ("_codecs", "encode"): encode_text,
    ("__builtin__", "bytes"): make_empty_bytes,
    ("builtins", "bytes"): make_empty_bytes,
}
"""Globals that mean plain data: part of every caller's table."""


# --- loading ---------------------------------------------------------------------------------


def load(
    file: BinaryIO,
    path: Path,
    allowed: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    *,
    end: int | None = None,
) -> Any:
    """The object that a pickle describes; `file` is left standing behind it.

    The result is made of None, bool, int, float, str, bytes, `LazyBytes`, list, tuple, set,
    frozenset, dict (with scalar keys), and what `allowed` and `persistent` give. It may contain
    itself, or the same object very often: walk it with a bound, and print it with `describe`.
    Attributes that are set on a dict (torch sets `_metadata`) are dropped.

    Args:
        file: stands at the first byte of the pickle; seekable.
        path: the file's own path, for `LazyBytes` and for messages.
        allowed: (module, name) as written in the pickle -> what stands for that global. What is
            callable may be called with any arguments: it must check them, and may raise any of
            ArithmeticError, AttributeError, LookupError, TypeError, ValueError.
        persistent: takes a persistent id; without it such ids are refused.
        end: the pickle ends before this byte of the file; its last byte by default.

    Raises:
        CheckpointError: the pickle names a global that is not in `allowed`, is damaged, truncated
            or absurd, or uses instructions that data does not need. Nothing was executed.
    """
    machine = _Machine(file, path, allowed, persistent, end)
    try:
        return machine.run()
    except _FAULTS as error:
        place = f"byte {machine.position}"
        reason = f"{type(error).__name__}: {error}"[:300]
        raise damaged(path, f"its pickle makes no sense at {place}", reason) from None


def damaged(path: Path, what: str, given: object = None) -> CheckpointError:
    """The error for a pickle that cannot be right."""
    return CheckpointError(
        f"{path} is damaged: {what}", given=given, fix="download or copy it again"
    )


def describe(value: Any) -> str:
    """A short description of anything a pickle may hold, also of what contains itself."""
    if isinstance(value, (str, bytes)):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _decode(string: bytes) -> str:
    """As Python does, also names with halves of surrogate pairs."""
    return string.decode("utf-8", "surrogatepass")


def _put(table: dict[Any, Any], key: Any, value: Any) -> None:
    _check_key(key)
    if key in table:
        raise ValueError(f"a dict with two entries for {describe(key)}")
    table[key] = value


def _check_key(key: Any) -> None:
    """Refuse what takes long to hash or to tell apart."""
    if type(key) not in _KEYS or (type(key) is int and abs(key) >= 2**63):
        raise ValueError(f"a dict or set with a key of type {type(key).__name__}")


class _Machine:
    """The stack machine. `marks` holds the height of the stack at each open MARK."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        allowed: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None,
        end: int | None,
    ) -> None:
        self.file, self.path, self.allowed, self.persistent = file, path, allowed, persistent
        self.constructors = {id(value) for value in allowed.values() if callable(value)}
        self.position = file.tell()
        size = file.seek(0, 2)
        file.seek(self.position)
        self.end = size if end is None else min(end, size)
        self.loaded = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.read(1)
            if code == pickle.STOP:
                return self.finish()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise self.unsupported(code)
            method, argument = instruction
            method(self, argument)
        raise damaged(self.path, f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    def finish(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise ValueError("it ends with unfinished objects")
        return self.stack[0]

    # reading

    def remaining(self) -> int:
        return self.end - self.position

    def read(self, count: int) -> bytes:
        if count > self.remaining():
            raise CheckpointError(
                f"{self.path} is truncated",
                given=f"its pickle ends at byte {self.end}",
                expected=f"{count} bytes from byte {self.position} on",
                fix="download or copy it again",
            )
        self.charge(count)
        self.position += count
        return self.file.read(count)

    def charge(self, count: int) -> None:
        self.loaded += count
        if self.loaded > MAX_LOADED_BYTES:
            raise damaged(self.path, f"its pickle has more than {MAX_LOADED_BYTES} bytes to load")

    def read_line(self) -> str:
        line = self.file.readline(min(MAX_NAME_BYTES + 1, self.remaining()))
        self.position += len(line)
        self.charge(len(line))
        if not line.endswith(b"\n"):
            raise ValueError(f"a name without an end: {describe(line)}")
        return line[:-1].decode("utf-8")

    def read_count(self, size: int) -> int:
        return int.from_bytes(self.read(size), "little")

    def read_string(self, size: int, kind: Literal["bytes", "text"]) -> bytes | LazyBytes:
        """A string behind a length of `size` bytes; a long one stays where it is."""
        length = self.read_count(size)
        if length < LAZY_FROM or length > self.remaining():
            return self.read(length)
        lazy = LazyBytes(self.path, self.position, length, kind)
        self.position += length
        self.file.seek(self.position)
        return lazy

    # the stack

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("an instruction reaches below a mark")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_items(self) -> list[Any]:
        """Everything above the last mark."""
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    # instructions

    def protocol(self, _: None) -> None:
        version = self.read_count(1)
        if version not in PROTOCOLS:
            raise CheckpointError(
                f"{self.path} is a pickle of another protocol",
                given=version,
                expected=f"{PROTOCOLS[0]} to {PROTOCOLS[-1]}",
            )

    def frame(self, _: None) -> None:
        """Frames only help buffering; all that matters is that they do not lie."""
        length = self.read_count(8)
        if length > self.remaining():
            raise damaged(self.path, f"a frame of {length} bytes, and {self.remaining()} are left")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_new(self, kind: type) -> None:
        self.stack.append(kind())

    def push_number(self, layout: struct.Struct) -> None:
        self.stack.append(layout.unpack(self.read(layout.size))[0])

    def push_integer(self, size: int) -> None:
        length = self.read_count(size)
        if length > MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {length} bytes")
        self.stack.append(int.from_bytes(self.read(length), "little", signed=True))

    def push_bytes(self, size: int) -> None:
        self.stack.append(self.read_string(size, "bytes"))

    def push_text(self, size: int) -> None:
        string = self.read_string(size, "text")
        self.stack.append(_decode(string) if isinstance(string, bytes) else string)

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def drop(self, _: None) -> None:
        self.pop()

    def drop_items(self, _: None) -> None:
        self.pop_items()

    def duplicate(self, _: None) -> None:
        self.stack.append(self.top())

    def collect_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_items()))

    def collect_frozenset(self, _: None) -> None:
        items = self.pop_items()
        for item in items:
            _check_key(item)
        self.stack.append(frozenset(items))

    def collect_few(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: Iterable[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise TypeError(f"{describe(target)} cannot be appended to")
        target.extend(items)

    def append_one(self, _: None) -> None:
        self.extend([self.pop()])

    def append_items(self, _: None) -> None:
        self.extend(self.pop_items())

    def set_pairs(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict:
            raise TypeError(f"{describe(target)} has no entries to set")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(target, key, value)

    def set_one(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.set_pairs([key, value])

    def set_items(self, _: None) -> None:
        self.set_pairs(self.pop_items())

    def add_items(self, _: None) -> None:
        items, target = self.pop_items(), self.top()
        if type(target) is not set:
            raise TypeError(f"{describe(target)} is not a set")
        for item in items:
            _check_key(item)
        target.update(items)

    def get(self, size: int) -> None:
        self.stack.append(self.memo[self.read_count(size)])

    def put(self, size: int) -> None:
        self.memo[self.read_count(size)] = self.top()

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.top()

    def push_global(self, _: None) -> None:
        module = self.read_line()
        self.stack.append(self.find(module, self.read_line()))

    def push_stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(self.find(module, name))

    def refuse_instance(self, code: bytes) -> None:
        """Protocol 0 calls and names a class in one instruction: say which."""
        module = self.read_line()
        self.find(module, self.read_line())
        raise self.unsupported(code)

    def call(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        if id(function) not in self.constructors:
            raise self.refused(f"call {describe(function)}")
        if type(arguments) is not tuple:
            raise TypeError(f"{describe(arguments)} as arguments")
        # A constructor may copy them, and the same ones may be given a million times.
        self.charge(sum(len(a) for a in arguments if type(a) in (str, bytes, tuple, list)))
        self.stack.append(function(*arguments))

    def build(self, _: None) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Buildable):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict:
            raise self.refused(f"set the state of {describe(target)}")

    def load_persistent(self, _: None) -> None:
        name = self.pop()
        if self.persistent is None:
            raise self.refused(f"fetch an object from elsewhere ({describe(name)})")
        self.stack.append(self.persistent(name))

    # refusing

    def find(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise TypeError(f"{describe(module)}.{describe(name)} as the name of a global")
        try:
            return self.allowed[module, name]
        except KeyError:
            raise self.refused(f"use {module[:80]}.{name[:80]}") from None

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is a pickle that wants to {what}",
            given=f"at byte {self.position}; nothing was executed",
            expected="tensors in dicts and lists, and nothing else",
            fix="ask for the weights alone, as safetensors or as a plain state dict; "
            "other tools may execute what this file says",
        )

    def unsupported(self, code: bytes) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged, or a pickle that does more than carry data",
            given=f"instruction {code!r} at byte {self.position - 1}; nothing was executed",
            expected="instructions for plain data, of protocols 2 to 5",
            fix="ask for the weights as safetensors, or download the file again",
        )


_INSTRUCTIONS: dict[bytes, tuple[Callable[[_Machine, Any], None], Any]] = {
    pickle.PROTO: (_Machine.protocol, None),
    pickle.FRAME: (_Machine.frame, None),
    pickle.NONE: (_Machine.push, None),
    pickle.NEWTRUE: (_Machine.push, True),
    pickle.NEWFALSE: (_Machine.push, False),
    pickle.EMPTY_TUPLE: (_Machine.push, ()),
    pickle.EMPTY_LIST: (_Machine.push_new, list),
    pickle.EMPTY_DICT: (_Machine.push_new, dict),
    pickle.EMPTY_SET: (_Machine.push_new, set),
    pickle.BININT: (_Machine.push_number, struct.Struct("<i")),
    pickle.BININT1: (_Machine.push_number, struct.Struct("<B")),
    pickle.BININT2: (_Machine.push_number, struct.Struct("<H")),
    pickle.BINFLOAT: (_Machine.push_number, struct.Struct(">d")),
    pickle.LONG1: (_Machine.push_integer, 1),
    pickle.LONG4: (_Machine.push_integer, 4),
    pickle.SHORT_BINBYTES: (_Machine.push_bytes, 1),
    pickle.BINBYTES: (_Machine.push_bytes, 4),
    pickle.BINBYTES8: (_Machine.push_bytes, 8),
    pickle.BYTEARRAY8: (_Machine.push_bytes, 8),
    pickle.SHORT_BINUNICODE: (_Machine.push_text, 1),
    pickle.BINUNICODE: (_Machine.push_text, 4),
    pickle.BINUNICODE8: (_Machine.push_text, 8),
    pickle.MARK: (_Machine.mark, None),
    pickle.POP: (_Machine.drop, None),
    pickle.POP_MARK: (_Machine.drop_items, None),
    pickle.DUP: (_Machine.duplicate, None),
    pickle.TUPLE: (_Machine.collect_tuple, None),
    pickle.FROZENSET: (_Machine.collect_frozenset, None),
    pickle.TUPLE1: (_Machine.collect_few, 1),
    pickle.TUPLE2: (_Machine.collect_few, 2),
    pickle.TUPLE3: (_Machine.collect_few, 3),
    pickle.APPEND: (_Machine.append_one, None),
    pickle.APPENDS: (_Machine.append_items, None),
    pickle.SETITEM: (_Machine.set_one, None),
    pickle.SETITEMS: (_Machine.set_items, None),
    pickle.ADDITEMS: (_Machine.add_items, None),
    pickle.BINGET: (_Machine.get, 1),
    pickle.LONG_BINGET: (_Machine.get, 4),
    pickle.BINPUT: (_Machine.put, 1),
    pickle.LONG_BINPUT: (_Machine.put, 4),
    pickle.MEMOIZE: (_Machine.memoize, None),
    pickle.GLOBAL: (_Machine.push_global, None),
    pickle.STACK_GLOBAL: (_Machine.push_stack_global, None),
    pickle.INST: (_Machine.refuse_instance, pickle.INST),
    pickle.REDUCE: (_Machine.call, None),
    pickle.NEWOBJ: (_Machine.call, None),
    pickle.BUILD: (_Machine.build, None),
    pickle.BINPERSID: (_Machine.load_persistent, None),
}
"""Instruction -> what to do, and what with. Every other one is refused: extension codes, objects
and text numbers of protocol 0, strings of Python 2, out-of-band buffers."""
