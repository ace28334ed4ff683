"""The training engine on MindSpore. Meaning: backends/contract.py.

Compiled, three graphs run: forward and backward of a micro-batch, which adds to the gradient
buffers; the exchange of gradients between ranks, which measures them; and the update. In between
the host decides whether and how far to go. Eagerly the same functions run uncompiled.

Parameters are worked on in buckets, laid flat behind one another: a kernel on CPU costs 20 to
30 us however small its tensors are, and an exchange over a network more. Inside graphs tuples are
walked with `Map`: MindSpore unrolls a `for` into nested calls and allows a thousand of them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint
from mindspore import ops as F

from backends.contract import AdamW, Group, LossScale, Norms
from backends.errors import BackendError
from backends.mindspore import parallel, runtime

STRATEGIES = parallel.STRATEGIES
PREFERS_COMPILED = True  # eager mode is several times slower

BUCKET_BYTES = 4 * 2**20
"""Larger parameters have a bucket of their own, which costs no copy."""
FULL_BUCKETS = 64
"""About as many buckets of several parameters there are at most, as a `for` walks them."""

MOMENTS = ("exp_avg", "exp_avg_sq")

_map = F.Map()

# --- buckets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bucket:
    """Parameters of one group, seen as one flat array; each rank updates its share of it.

    All is float32. Unless the strategy shards, the share is everything.
    """

    group: int
    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    """Those of the names, and perhaps one more of zeros, which fills up to equal shares."""
    gradient: Parameter
    """[size]: what `accumulate` adds to."""
    share: Parameter
    """[size / shards]: this rank's part of the gradient, summed over ranks."""
    exp_avg: Parameter
    exp_avg_sq: Parameter

    def places(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape, begin and end in the flat array)."""
        begin = 0
        for name, parameter in zip(self.names, self.parameters):
            yield name, tuple(parameter.shape), begin, begin + parameter.size
            begin += parameter.size


def _buckets(
    groups: Sequence[Group], parameters: Mapping[str, Parameter], shards: int
) -> tuple[_Bucket, ...]:
    """Those of several parameters come first."""
    sizes = [4 * p.size for p in parameters.values()]
    limit = max(BUCKET_BYTES, sum(n for n in sizes if n <= BUCKET_BYTES) // FULL_BUCKETS)
    found = [
        _bucket(n, pack, shards)
        for n, group in enumerate(groups)
        for pack in _packs([(name, parameters[name]) for name in group.parameters], limit)
    ]
    return tuple(sorted(found, key=lambda bucket: len(bucket.parameters) == 1))


def _packs(named: Sequence[tuple[str, Parameter]], limit: int) -> Iterator[list]:
    """Parts of at most `limit` bytes or one parameter."""
    pack: list[tuple[str, Parameter]] = []
    for name, parameter in named:
        if 4 * parameter.size > limit:
            yield [(name, parameter)]
            continue
        held = sum(4 * p.size for _, p in pack)
        if held + 4 * parameter.size > limit:
            yield pack
            pack = []
        pack.append((name, parameter))
    if pack:
        yield pack


def _bucket(group: int, named: Sequence[tuple[str, Parameter]], shards: int) -> _Bucket:
    names, parameters = zip(*named)
    first, size = names[0], sum(p.size for p in parameters)
    if size % shards:
        filler = Parameter(F.zeros((-size % shards,), ms.float32), f"filler.{first}")
        parameters, size = (*parameters, filler), size + filler.size
    gradient = _zeros(size, f"gradient.{first}")
    share = gradient if shards == 1 else _zeros(size // shards, f"share.{first}")
    moments = [_zeros(size // shards, f"{kind}.{first}") for kind in MOMENTS]
    return _Bucket(group, names, parameters, gradient, share, *moments)


def _zeros(size: int, name: str) -> Parameter:
    return Parameter(F.zeros((size,), ms.float32), name, requires_grad=False)


# --- parts of graphs -------------------------------------------------------------------------


def _row(x: Tensor) -> Tensor:
    return F.reshape(x, (-1,))


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return F.cat(_map(_row, parts), 0) if len(parts) > 1 else _row(parts[0])


def _alone(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _add(buffer: Parameter, parts: tuple[Tensor, ...]) -> Tensor:
    return F.assign_add(buffer, _flat(parts))


def _size(parameter: Parameter) -> int:
    return parameter.size


def _set(parameter: Parameter, values: Tensor) -> Tensor:
    return F.assign(parameter, F.reshape(values, parameter.shape))


def _set_all(parameters: tuple[Parameter, ...], flat: Tensor) -> Any:
    if len(parameters) == 1:
        return _set(parameters[0], flat)
    return _map(_set, parameters, mint.split(flat, _map(_size, parameters)))


def _clear(buffer: Parameter) -> Tensor:
    return F.assign(buffer, F.zeros_like(buffer))


def _same(x: Tensor) -> Tensor:
    return x


# --- graphs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exchange:
    """What goes over the network, on flat arrays."""

    reduce: Callable[[Tensor], Tensor]
    """This rank's share of the sum over ranks."""
    own: Callable[[Tensor], Tensor]
    """This rank's share of what all ranks have alike."""
    gather: Callable[[Tensor], Tensor]
    """The whole, from the shares of all ranks."""
    total: Callable[[Tensor], Tensor]
    """Sums of shares -> sums of the whole."""


def _exchange(strategy: str) -> _Exchange:
    rank, ranks = parallel.world()
    if ranks == 1:
        return _Exchange(_same, _same, _same, _same)
    all_reduce = F.AllReduce()
    if strategy == "ddp":
        return _Exchange(all_reduce, _same, _same, _same)

    def own(flat: Tensor) -> Tensor:
        return F.split(flat, flat.shape[0] // ranks)[rank]

    def reduce(flat: Tensor) -> Tensor:
        return own(all_reduce(flat))

    on_cpu = runtime.current()[0] == "cpu"  # which has no ReduceScatter
    return _Exchange(reduce if on_cpu else F.ReduceScatter(), own, F.AllGather(), all_reduce)


def _accumulation(
    module: ms.nn.Cell, buckets: Sequence[_Bucket], places: tuple[int, ...]
) -> Callable[..., Tensor]:
    """(scale, tensors) -> scale * value; gradients are added to the buffers.

    `places`: for each input of the module the tensor that it is, -1 for None.
    """
    weights = ParameterTuple([p for bucket in buckets for p in bucket.parameters])
    buffers = tuple(bucket.gradient for bucket in buckets)
    ends = [0]
    for bucket in buckets:
        if len(bucket.parameters) > 1:
            ends.append(ends[-1] + len(bucket.parameters))
    bounds = tuple(itertools.pairwise(ends))

    def value(scale: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        inputs = ()
        for place in places:
            inputs = (*inputs, None if place < 0 else tensors[place])
        return module(*inputs) * scale

    def accumulate(scale: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        total, slopes = ms.value_and_grad(value, None, weights)(scale, tensors)
        parts = ()
        for begin, end in bounds:
            parts = (*parts, slopes[begin:end])
        if len(bounds) < len(buffers):
            parts = parts + _map(_alone, slopes[ends[-1] :])
        _map(_add, buffers, parts)
        return total

    return accumulate


def _measurement(buckets: Sequence[_Bucket], exchange: _Exchange, ranks: int) -> Callable:
    """() -> the sum of squares of each bucket's gradient, once its shares hold the sum of ranks."""
    buffers = tuple(bucket.gradient for bucket in buckets)
    shares = tuple(bucket.share for bucket in buckets)

    def measure_one(buffer: Parameter, share: Parameter) -> Tensor:
        gradient = buffer if ranks == 1 else F.assign(share, exchange.reduce(buffer))
        return F.sum(F.square(gradient))

    def measure() -> Tensor:
        return exchange.total(F.stack(_map(measure_one, buffers, shares)))

    return measure


def _application(
    buckets: Sequence[_Bucket], exchange: _Exchange, settings: AdamW
) -> Callable[[tuple], Any]:
    """(numbers) -> AdamW is done and gradients are zero.

    `numbers` are float32 scalars, four for each bucket: what to multiply the gradient with, and
    with t steps taken, c1 = 1 - b1^t and c2 = 1 - b2^t, eps * sqrt(c2), lr * sqrt(c2) / c1 and
    lr * weight decay.
    """
    parameters = tuple(bucket.parameters for bucket in buckets)
    buffers = tuple(bucket.gradient for bucket in buckets)
    shares = tuple(bucket.share for bucket in buckets)
    averages = tuple(bucket.exp_avg for bucket in buckets)
    squares = tuple(bucket.exp_avg_sq for bucket in buckets)
    beta1, beta2 = settings.beta1, settings.beta2
    new1, new2 = 1 - beta1, 1 - beta2

    def apply_one(parameters, buffer, share, average, square, numbers):
        factor, epsilon, rate, decay = numbers
        g = share * factor
        m = F.assign(average, average * beta1 + g * new1)
        v = F.assign(square, square * beta2 + F.square(g) * new2)
        p = exchange.own(_flat(parameters))
        p = p - (p * decay + m / (F.sqrt(v) + epsilon) * rate)
        _set_all(parameters, exchange.gather(p))
        return _clear(buffer)

    def apply(numbers: tuple) -> Any:
        return _map(apply_one, parameters, buffers, shares, averages, squares, numbers)

    return apply


def _clearing(buckets: Sequence[_Bucket]) -> Callable[[], Any]:
    """() -> gradients are zero."""
    buffers = tuple(bucket.gradient for bucket in buckets)

    def clear() -> Any:
        return _map(_clear, buffers)

    return clear


# --- the engine ------------------------------------------------------------------------------


class Engine:
    """See backends/contract.py. `options` are keyword arguments of `mindspore.jit`."""

    def __init__(
        self,
        module: ms.nn.Cell,
        groups: Sequence[Group],
        settings: AdamW,
        *,
        strategy: str = "single",
        compiled: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """As the contract says."""
        parallel.check(strategy)
        self._module, self._groups, self._settings = module, tuple(groups), settings
        self._rank, self._ranks = parallel.world()
        self._compiled, self._options = compiled, dict(options or {})
        self._shards = self._ranks if strategy == "zero1" else 1
        self._buckets = _buckets(groups, _trained(module, groups), self._shards)
        self._steps = 0
        self._loss_scale = LossScale() if runtime.current()[1] == "float16" else None
        exchange = _exchange(strategy)
        self._accumulations: dict[tuple[int, ...], Callable[..., Tensor]] = {}
        self._measure = self._graph(_measurement(self._buckets, exchange, self._ranks))
        self._apply = self._graph(_application(self._buckets, exchange, settings))
        self._clear = self._graph(_clearing(self._buckets))

    def _graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return ms.jit(function, **self._options) if self._compiled else function

    # --- steps --------------------------------------------------------------------------------

    def accumulate(
        self, inputs: Sequence[np.ndarray | None], scale: float, last: bool = False
    ) -> float:
        """As the contract says; nothing is exchanged before `update`."""
        present = [x for x in inputs if x is not None]
        counter = iter(range(len(present)))
        places = tuple(-1 if x is None else next(counter) for x in inputs)
        if places not in self._accumulations:
            graph = _accumulation(self._module, self._buckets, places)
            self._accumulations[places] = self._graph(graph)
        size = self._loss_scale.size if self._loss_scale else 1.0
        tensors = ms.mutable(tuple(_tensor(x) for x in present))
        value = self._accumulations[places](_scalar(scale * size), tensors)
        return float(value.asnumpy()) / size

    def update(self, rates: Mapping[str, float]) -> Norms:
        """As the contract says."""
        size = self._loss_scale.size if self._loss_scale else 1.0
        norms = self._norms(self._measure().asnumpy().astype(np.float64), size)
        if norms.skipped:
            self._clear()
        else:
            self._steps += 1
            self._step(norms.total, size, rates)
        if self._loss_scale:
            self._loss_scale = self._loss_scale.after(norms.skipped)
        return norms

    def _norms(self, squares: np.ndarray, size: float) -> Norms:
        sums = dict.fromkeys((group.name for group in self._groups), 0.0)
        for bucket, square in zip(self._buckets, squares):
            sums[self._groups[bucket.group].name] += float(square)
        total = math.sqrt(sum(sums.values())) / size
        groups = {name: math.sqrt(value) / size for name, value in sums.items()}
        return Norms(total, groups, skipped=not math.isfinite(total))

    def _step(self, norm: float, size: float, rates: Mapping[str, float]) -> None:
        settings, factor = self._settings, 1.0
        if settings.clip_norm is not None:
            factor = min(1.0, settings.clip_norm / (norm + 1e-6))
        bias1, bias2 = (1 - beta**self._steps for beta in (settings.beta1, settings.beta2))
        numbers = []
        for group in self._groups:
            rate = rates[group.name]
            numbers.append(
                (
                    _scalar(factor / size),
                    _scalar(settings.eps * math.sqrt(bias2)),
                    _scalar(rate * math.sqrt(bias2) / bias1),
                    _scalar(rate * group.weight_decay),
                )
            )
        self._apply(ms.mutable(tuple(numbers[bucket.group] for bucket in self._buckets)))

    @property
    def steps(self) -> int:
        """Updates taken so far."""
        return self._steps

    @property
    def loss_scale(self) -> LossScale | None:
        """What the next `accumulate` uses."""
        return self._loss_scale

    # --- state --------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, str, np.ndarray | None]]:
        """As the contract says."""
        held = [0] * self._ranks
        for bucket in self._buckets:
            for name, shape, begin, end in bucket.places():
                owner = held.index(min(held))
                held[owner] += end - begin
                mine = owner == self._rank
                yield name, "parameter", runtime.fetch(self._module, name) if mine else None
                for kind in MOMENTS:
                    flat = self._whole(getattr(bucket, kind), begin, end)
                    yield name, kind, flat.reshape(shape) if mine else None

    def _whole(self, moment: Parameter, begin: int, end: int) -> np.ndarray:
        """[begin, end) of a flat moment, on every rank."""
        share, length = moment.asnumpy(), moment.size
        if self._shards == 1:
            return share[begin:end]
        low, high = _overlap(self._rank, length, begin, end)
        piece = np.zeros(min(length, end - begin), np.float32)
        piece[: high - low] = share[low - self._rank * length : high - self._rank * length]
        parts = []
        for rank, gathered in enumerate(parallel.gather(piece)):
            low, high = _overlap(rank, length, begin, end)
            parts.append(gathered[: high - low])
        return np.concatenate(parts)

    def restore(
        self,
        steps: int,
        read: Callable[[str, str], np.ndarray],
        loss_scale: LossScale | None = None,
    ) -> None:
        """As the contract says; moments are read only where a part of them is this rank's."""
        for bucket in self._buckets:
            for name, *_ in bucket.places():
                runtime.assign(self._module, name, read(name, "parameter"))
            for kind in MOMENTS:
                self._restore_moment(bucket, kind, read)
        self._clear()
        self._steps = steps
        if self._loss_scale:
            self._loss_scale = loss_scale or LossScale()

    def _restore_moment(self, bucket: _Bucket, kind: str, read: Callable) -> None:
        moment = getattr(bucket, kind)
        share = np.zeros(moment.size, np.float32)
        rank = self._rank if self._shards > 1 else 0
        first = rank * moment.size
        for name, shape, begin, end in bucket.places():
            low, high = _overlap(rank, moment.size, begin, end)
            if low < high:
                array = read(name, kind)
                if array.shape != shape:
                    raise BackendError(
                        f"{kind} of {name!r} cannot take this array",
                        given=f"shape {array.shape}",
                        expected=f"shape {shape}",
                    )
                share[low - first : high - first] = array.reshape(-1)[low - begin : high - begin]
        # In place: compiled graphs hold on to the storage.
        moment.copy_(Tensor.from_numpy(share))


def _overlap(rank: int, length: int, begin: int, end: int) -> tuple[int, int]:
    """What of [begin, end) lies in a rank's share of `length` values; low == high if nothing."""
    low = max(begin, rank * length)
    return low, max(low, min(end, (rank + 1) * length))


def _trained(module: ms.nn.Cell, groups: Sequence[Group]) -> dict[str, Parameter]:
    """Name -> parameter of those that the groups name, which must be the trained ones."""
    parameters = {n: p for n, p in module.parameters_and_names() if p.requires_grad}
    named = Counter(name for group in groups for name in group.parameters)
    problems = {
        "are trained but in no group": set(parameters) - set(named),
        "are in a group but not trained": set(named) - set(parameters),
        "are in a group twice": {name for name, count in named.items() if count > 1},
    }
    for problem, names in problems.items():
        if names:
            raise BackendError(
                f"parameters {problem}",
                given=", ".join(sorted(names)[:5]),
                expected="every trained parameter once in the groups together",
            )
    return parameters


def _tensor(array: np.ndarray) -> Tensor:
    return runtime.tensor32(array) if array.dtype == np.float64 else runtime.tensor(array)


def _scalar(value: float) -> Tensor:
    return Tensor(value, ms.float32)
