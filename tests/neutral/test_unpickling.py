"""The unpickler against Python's own pickler, and against programs that mean harm."""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import random
import struct
import subprocess
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage import unpickling
from weight_convert.storage.unpickling import LAZY_FROM, PLAIN, Buildable, LazyBytes, describe, load

NOWHERE = Path("a.pkl")
PROTOCOLS = range(2, 6)
PICKLERS = (pickle.dumps, pickle._dumps)  # the one in C and the one in Python differ in details


def read(data: bytes, allowed: Mapping[tuple[str, str], Any] = PLAIN, **options: Any) -> Any:
    return load(io.BytesIO(data), NOWHERE, allowed, **options)


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


# --- plain data ------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=300)
)
KEYS = st.text(max_size=8) | st.integers(-(2**40), 2**40) | st.booleans() | st.none()
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(value=DATA, protocol=st.sampled_from(PROTOCOLS), dumps=st.sampled_from(PICKLERS))
def test_plain_data_comes_back(value: Any, protocol: int, dumps: Callable[..., bytes]) -> None:
    assert read(dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dumps", PICKLERS)
def test_other_containers(protocol: int, dumps: Callable[..., bytes]) -> None:
    ordered = OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 1}}  # as torch does: dropped
    many = {f"name.{n}": [n] for n in range(2001)}  # several batches, and long memo indices
    value = read(dumps([ordered, many, many, "a\ud800"], protocol))
    assert list(value[0].items()) == [("b", 1), ("a", 2)] and type(value[0]) is dict
    assert value[1] == many and value[1] is value[2]
    assert value[3] == "a\ud800"
    if protocol >= 4:
        sets = [{1, "a"}, frozenset({2, b"b"}), set(), frozenset()]
        assert read(dumps(sets, protocol)) == sets
    if protocol >= 5:
        assert read(dumps([bytearray(b"abc")], protocol)) == [b"abc"]


def test_what_contains_itself_can_be_read_and_described() -> None:
    value: list[Any] = []
    value += [value, {"x": value}]
    found = read(pickle.dumps(value, 2))
    assert found[0] is found and found[1]["x"] is found
    assert describe(found) == "list of 2"
    assert [describe(x) for x in ("a", 1, None, b"b", (1,), LazyBytes(NOWHERE, 0, 1))] == [
        "'a'", "1", "None", "b'b'", "tuple of 1", "LazyBytes",
    ]  # fmt: skip
    assert len(describe("x" * 10_000)) < 100


def test_one_pickle_after_another() -> None:
    file = io.BytesIO(b"head" + pickle.dumps([1], 2) + pickle.dumps("second", 4) + b"tail")
    file.seek(4)
    assert load(file, NOWHERE, PLAIN) == [1]
    assert load(file, NOWHERE, PLAIN) == "second"
    assert file.read() == b"tail"


def test_the_end_that_is_given_holds() -> None:
    data = pickle.dumps("abcdef", 3)
    assert read(data + b"more", end=len(data)) == "abcdef"
    with pytest.raises(CheckpointError, match="truncated"):
        read(data, end=len(data) - 3)


# --- long strings ----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [0, 1, LAZY_FROM - 1, LAZY_FROM, 3 * 2**20 + 1])
def test_long_bytes_stay_in_the_file(tmp_path: Path, protocol: int, size: int) -> None:
    path, content = tmp_path / "x.pkl", random.Random(size).randbytes(size)
    with path.open("wb") as file:
        file.write(b"before")
        pickle.dump({"first": content, "second": 5}, file, protocol)
    with path.open("rb") as file:
        file.seek(6)
        value = load(file, path, PLAIN)
    assert value["second"] == 5
    if size < LAZY_FROM and protocol > 2:
        assert value["first"] == content
        return
    if isinstance(value["first"], bytes):  # as text in protocol 2, and short
        assert value["first"] == content
        return
    lazy = value["first"]
    assert lazy.kind == ("latin-1" if protocol == 2 else "bytes")
    assert lazy.read(size).tobytes() == content
    for wrong in (0, size - 1, size + 1, 2**60):
        with pytest.raises(CheckpointError, match="another size"):
            lazy.read(wrong)


def test_reading_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"x": bytes(50 * 2**20), "y": "y" * 2**20}, 4))
    tracemalloc.start()
    with path.open("rb") as file:
        value = load(file, path, PLAIN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert value["x"].length == 50 * 2**20
    assert value["y"].kind == "text"


def test_decoding_costs_one_copy(tmp_path: Path) -> None:
    path, size = tmp_path / "x.pkl", 20 * 2**20
    path.write_bytes(pickle.dumps(b"\xff" * size, 2))
    with path.open("rb") as file:
        lazy = load(file, path, PLAIN)
    tracemalloc.start()
    array = lazy.read(size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (array == 255).all()
    assert peak < size + 8 * 2**20


def test_text_is_not_taken_for_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps("\u0100" * LAZY_FROM, 2))
    with path.open("rb") as file:
        lazy = load(file, path, PLAIN)
    with pytest.raises(CheckpointError, match="text where bytes"):
        lazy.read(LAZY_FROM)
    encoded = LazyBytes(path, lazy.offset, lazy.length, "latin-1")
    with pytest.raises(CheckpointError, match="not latin-1"):
        encoded.read(LAZY_FROM)


def test_a_file_that_was_cut_since(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(b"\xff" * 2 * LAZY_FROM, 2))
    with path.open("rb") as file:
        lazy = load(file, path, PLAIN)
    os.truncate(path, LAZY_FROM)
    with pytest.raises(CheckpointError):
        lazy.read(2 * LAZY_FROM)


# --- allowed globals -------------------------------------------------------------------------


class Point(Buildable):
    def __init__(self, *coordinates: int) -> None:
        self.coordinates = coordinates
        self.state: Any = None

    def build(self, state: Any) -> None:
        self.state = state


def test_only_what_is_listed_is_called() -> None:
    allowed = {("geometry", "Point"): Point, ("geometry", "origin"): "the origin"}
    point = b"cgeometry\nPoint\n"
    value = read(program(point, b"K\x01K\x02\x86R", b"K\x07b"), allowed)
    assert (value.coordinates, value.state) == ((1, 2), 7)
    assert read(program(point, b")\x81"), allowed).coordinates == ()  # NEWOBJ
    assert read(program(b"cgeometry\norigin\n"), allowed) == "the origin"
    for callee in (b"cgeometry\norigin\n", text("str"), b"}", point + b")R"):
        with pytest.raises(CheckpointError, match="wants to call"):
            read(program(callee, b")R"), allowed)


def test_faults_of_constructors_are_reported() -> None:
    for error in (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError):

        def fail(*_: Any, error: type[Exception] = error) -> None:
            raise error("no good")

        with pytest.raises(CheckpointError, match=f"{error.__name__}: .*no good"):
            read(program(b"ca\nb\n)R"), {("a", "b"): fail})


def test_persistent_ids() -> None:
    data = program(b"K\x05Q")
    assert read(data, persistent=lambda name: name + 1) == 6
    with pytest.raises(CheckpointError, match="elsewhere"):
        read(data)


# --- malice ----------------------------------------------------------------------------------


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call

    def __call__(self) -> None:
        """Picklers want what is called to be callable."""


EXTENSION = 240
"""A code that no library registers."""


def attacks(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Programs that make Python's own unpickler create the marker, each in another way."""
    shell, create = f"echo > {marker}", f"open({str(marker)!r}, 'w').close()"
    argument, arguments = text(shell), text(shell) + b"\x85"
    for protocol in PROTOCOLS:
        chain = Reduced(getattr, (Reduced(__import__, ("os",)), "system"))
        for name, value in {
            "os.system": Reduced(os.system, (shell,)),
            "eval": {"weight": Reduced(eval, (create,))},
            "exec": [Reduced(exec, (create,))],
            "getattr": Reduced(chain, (shell,)),
            "run": (Reduced(subprocess.run, (["touch", str(marker)],)),),
        }.items():
            yield f"{name} {protocol}", pickle.dumps(value, protocol)
    yield "instance", program(b"(", argument, b"ios\nsystem\n")
    yield "object", program(b"(cos\nsystem\n", argument, b"o")
    yield "global", program(b"cposix\nsystem\n", arguments, b"R")
    yield "stack global", program(text("posix"), text("system"), b"\x93", arguments, b"R")
    yield "dotted", program(text("shutil"), text("os.system"), b"\x93", arguments, b"R")
    yield "extension", program(b"\x82", bytes([EXTENSION]), arguments, b"R")
    yield "memo", program(b"cos\nsystem\n\x940h\x00", arguments, b"R")
    partial = b"cfunctools\npartial\ncbuiltins\nprint\n\x85R"
    yield "state", program(partial, b"(cos\nsystem\n", arguments, b"}Ntb)R")
    yield "protocol 0", pickle.dumps(Reduced(os.system, (shell,)), 0)


def test_nothing_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    copyreg.add_extension("os", "system", EXTENSION)
    try:
        for name, data in attacks(marker):
            with pytest.raises(CheckpointError, match="nothing was executed"):
                read(data)
            assert not marker.exists(), name
            pickle.loads(data)
            assert marker.exists(), f"{name} is no attack"
            marker.unlink()
    finally:
        copyreg.remove_extension("os", "system", EXTENSION)


@pytest.mark.parametrize(
    "data, name",
    [
        (pickle.dumps(Reduced(os.system, ("true",)), 2), "posix.system"),
        (pickle.dumps(Reduced(eval, ("1",)), 4), "builtins.eval"),
        (program(b"(ios\nsystem\n"), "os.system"),
        (program(text("a" * 3000), text("b"), b"\x93"), "a{80}.b"),
    ],
)
def test_the_refused_global_is_named(data: bytes, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"wants to use {name}\n"):
        read(data)


@pytest.mark.parametrize(
    "part",
    [
        b"]}b",  # a state for a list
        b"}]b",  # a dict with a list of attributes
        b"})}\x92",  # NEWOBJ_EX
        b"\x97",  # NEXT_BUFFER
        b"\x98",  # READONLY_BUFFER
        b"Pname\n",  # PERSID
        b"\x83\x00\x01",
        b"\x84\x00\x00\x00\x01",
        b"I01\n",
        b"S'a'\n",
        b"U\x01a",
        b"\xff",
        b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R",
        b"c_codecs\nencode\nK\x05\x85R",
        b"]" + text("a") + text("b") + b"s",  # SETITEM on a list
        b"}K\x01a",  # APPEND to a dict
        b"}(K\x01u",  # a key without a value
        b"](K\x01\x90",  # ADDITEMS to a list
        b"\x8f(]\x90",  # a list in a set
        b"(]\x91",
        b"}]Ns",  # a list as a key
        b"}NNsNNs",  # the same key twice
        b"\x85",  # a tuple of what is not there
        b"(0",  # POP below a mark
        b"1",
        b"h\x07",
        b"j\x07\x00\x00\x00",
        b"q\x00",
        b"K\x01K\x02",  # two objects
        b"",
        b"N(",
        text("a") + b"K\x01\x93",
        b"cos\nsys",
        b"c" + b"a" * 1000 + b"\nb\n",
        b"c\xff\nb\n",
        b"X\x01\x00\x00\x00\xff",
        b"\x80\x06",
        b"\x80\x01",
    ],
)
def test_senseless_programs_are_refused(part: bytes) -> None:
    with pytest.raises(CheckpointError):
        read(program(part))


# --- bombs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, part",
    [
        ("a key that takes 2^60 steps to hash", b"}" + b")" + b"2\x86" * 60 + b"Ns"),
        ("the same in a set", b"\x8f()" + b"2\x86" * 60 + b"\x90"),
        ("the same in a frozenset", b"()" + b"2\x86" * 60 + b"\x91"),
        ("a key of 32 bytes", b"}\x8a\x1f" + b"\x01" * 31 + b"Ns"),
        ("an integer of 2 GiB", b"\x8b\xff\xff\xff\x7f"),
        ("a negative length", b"\x8b\xff\xff\xff\xff"),
        ("an integer of 4000 bytes", b"\x8b\xa0\x0f\x00\x00" + bytes(4000)),
        ("bytes of 2^63", b"\x8e" + b"\xff" * 7 + b"\x7f"),
        ("bytes of 2^64", b"\x8e" + b"\xff" * 8),
        ("bytes of 4 GiB", b"B\xff\xff\xff\xff"),
        ("a bytearray of 2^60", b"\x96" + struct.pack("<Q", 2**60)),
        ("text of 2^60", b"\x8d" + struct.pack("<Q", 2**60)),
        ("text of 4 GiB", b"X\xff\xff\xff\xff"),
        ("a frame of 2^63", b"\x95" + b"\xff" * 7 + b"\x7fN"),
    ],
)
def test_bombs_fizzle(name: str, part: bytes) -> None:
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        read(program(part))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 2 and peak < 2**20, name


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "MAX_INSTRUCTIONS", 1000)
    for part in (b"(" * 2000, b"]" * 2000, b"N0" * 2000):
        with pytest.raises(CheckpointError, match="more than 1000 instructions"):
            read(program(part))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one long text is encoded again and again."""
    monkeypatch.setattr(unpickling, "MAX_LOADED_BYTES", 50_000)
    with pytest.raises(CheckpointError, match="to load"):
        read(pickle.dumps(["x" * 4000 + str(n) for n in range(20)], 4))
    encode = b"c_codecs\nencode\n\x940" + text("x" * 4000) + b"\x85\x940"
    assert len(read(program(encode, b"]", b"h\x00h\x01Ra" * 9))) == 9
    with pytest.raises(CheckpointError, match="to load"):
        read(program(encode, b"]", b"h\x00h\x01Ra" * 20))


def test_depth_is_no_danger() -> None:
    """Neither to reading nor to describing nor to forgetting it."""
    depth = 200_000
    value = read(program(b"]" * depth, b"a" * (depth - 1)))
    assert describe(value) == "list of 1"
    assert describe(read(program(b")", b"\x85" * depth))) == "tuple of 1"


# --- damage ----------------------------------------------------------------------------------

SAMPLE = {
    "names": ["a", "bc", "\u00e9"],
    "numbers": [1, -1, 300, 70_000, 2**40, 1.5, True, None],
    "nested": {"t": (1, 2), "u": (1, 2, 3, 4), 5: [{}, [], ()]},
    "bytes": b"\x00\xff",
    "long": b"\xfe" * (LAZY_FROM + 1),
    "ordered": OrderedDict(x=1),
}
SEED, FUZZ_INPUTS = 20, 12_000
PLAIN_TYPES = (type(None), bool, int, float, str, bytes, LazyBytes)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_noticed(protocol: int) -> None:
    data = pickle.dumps(SAMPLE, protocol)
    cuts = [cut for cut in range(len(data)) if cut < 300 or cut > LAZY_FROM]
    for cut in cuts:
        with pytest.raises(CheckpointError):
            read(data[:cut])
    assert len(cuts) > 350


def sound(value: Any, budget: int = 10_000) -> bool:
    """Whether a result holds plain data and what was allowed alone, as far as it is walked."""
    listed = (*PLAIN.values(), Point)
    pending = [value]
    while pending and budget:
        budget -= 1
        item = pending.pop()
        if type(item) in (list, tuple, set, frozenset):
            pending.extend(item)
        elif type(item) is dict:
            pending.extend([*item, *item.values()])
        elif type(item) not in (*PLAIN_TYPES, Point) and not any(item is one for one in listed):
            return False
    return True


def mutate(data: bytes, random: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a piece cut out, doubled or moved, an instruction."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place, kind = random.randrange(len(changed)), random.randrange(6)
        length = random.randint(1, 12)
        if kind == 0:
            changed[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[place] = random.randrange(256)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length]
        elif kind == 4:
            target = random.randrange(len(changed))
            changed[target:target] = changed[place : place + length]
        else:
            changed[place:place] = random.choice(INSTRUCTIONS)
        changed = changed or bytearray(b".")
    return bytes(changed)


INSTRUCTIONS = [code for code, _ in unpickling._INSTRUCTIONS.items()]


def test_fuzzed_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations of sound pickles: an error of ours, or plain data. Nothing else is ever raised."""
    forbid_execution(monkeypatch)
    chance, start = random.Random(SEED), time.monotonic()
    sources = [pickle.dumps(SAMPLE | {"long": b""}, protocol) for protocol in PROTOCOLS]
    sources += [pickle.dumps({"long": b"\xfe" * LAZY_FROM}, protocol) for protocol in PROTOCOLS]
    results = 0
    for number in range(FUZZ_INPUTS):
        try:
            value = read(mutate(sources[number % len(sources)], chance))
        except CheckpointError:
            continue
        assert sound(value)
        results += 1
    assert 0 < results < FUZZ_INPUTS
    assert time.monotonic() - start < 60


def test_fuzzed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random instructions, which go deeper into the machine than damage does."""
    forbid_execution(monkeypatch)
    chance = random.Random(SEED)
    pieces = [*INSTRUCTIONS, b"K\x01", text("a"), b"c_codecs\nencode\n", b"h\x00", b"\x94", b"("]
    results = 0
    for _ in range(FUZZ_INPUTS):
        parts = chance.choices(pieces, k=chance.randint(1, 30))
        try:
            value = read(program(*parts), PLAIN | {("a", "b"): Point}, persistent=lambda name: name)
        except CheckpointError:
            continue
        assert sound(value)
        results += 1
    assert results > 0


def forbid_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*_: Any, **__: Any) -> None:
        raise AssertionError("executed")

    for module, name in ((os, "system"), (subprocess, "Popen"), (builtins, "eval")):
        monkeypatch.setattr(module, name, execute)
