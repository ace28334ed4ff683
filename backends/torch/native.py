"""What torch itself offers to train with: one device, DDP, FSDP2.

The three share one update: the optimizer sees the plain tensors of this rank (with FSDP its
shards), so that norms, clipping and AdamW are the same fused kernels everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.contract import AdamW, Group, Norms
from backends.errors import BackendError
from backends.torch import ops

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FUSED_DEVICES = ("cpu", "cuda", "xpu")
"""Where torch.optim.AdamW has its one-kernel form; elsewhere it works by lists of tensors."""
BUCKET_BYTES = 64 * 2**20
"""Gradients that are joined for one exchange."""


def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers: elements of every ModuleList that hold parameters."""
    lists = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    return [block for part in lists for block in part if any(True for _ in block.parameters())]


def new_state(tensor: Tensor, fused: bool) -> dict[str, Tensor]:
    """What torch.optim.AdamW keeps of a parameter, before the first step."""
    return {
        "step": torch.zeros((), device=tensor.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(tensor, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
    }


def own_rows(parameter: Tensor, array: Any) -> Any:
    """This rank's rows of a whole array or tensor, for a parameter that FSDP has sharded.

    fully_shard cuts axis 0 as torch.chunk does.
    """
    rows = -(-array.shape[0] // parameter.device_mesh.size())
    start = parameter.device_mesh.get_local_rank() * rows
    return array[start : start + rows]


class Single:
    """Everything on one device."""

    def __init__(
        self,
        module: torch.nn.Module,
        groups: Sequence[Group],
        settings: AdamW,
        options: Mapping[str, Any],
    ) -> None:
        self.forward = self._wrap(module, **_known(options, self.options))
        parameters = dict(module.named_parameters())
        self.groups, self.clip_norm = tuple(groups), settings.clip_norm
        self.parameters = {n: parameters[n] for group in groups for n in group.parameters}
        self.local = {name: self._local(p) for name, p in self.parameters.items()}
        fused = ops.DEVICE.type in FUSED_DEVICES
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.local[n] for n in group.parameters if self.local[n].numel()],
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            lr=0.0,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=fused,
            foreach=not fused,
        )
        self.state = {name: new_state(tensor, fused) for name, tensor in self.local.items()}
        for name, tensor in self.local.items():
            if tensor.numel():
                self.optimizer.state[tensor] = self.state[name]

    options: tuple[str, ...] = ()
    """What the recipe's options may say."""

    # --- what the strategies do differently ---------------------------------------------------

    def _wrap(self, module: torch.nn.Module) -> Callable[..., Tensor]:
        """Prepare the module; what to call instead of it."""
        return module

    def _local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or gradient."""
        return tensor

    def _separate(self) -> None:
        """Give every gradient memory of its own, for the next one is added in place.

        Autograd does not: of one tile the gradient of the class token is the first row of that of
        the positions, and both would get what is meant for one.
        """
        end = 0
        with_gradient = (p for p in self.parameters.values() if p.grad is not None)
        for parameter in sorted(with_gradient, key=lambda p: p.grad.data_ptr()):
            gradient = parameter.grad
            if gradient.data_ptr() < end:
                parameter.grad = gradient.clone()
            else:
                end = gradient.data_ptr() + gradient.nbytes

    def _exchange(self) -> None:
        """Sum gradients over the ranks, if that is not yet done."""

    def _sum(self, squares: Tensor) -> Tensor:
        """Sum of what each rank found in its part of the gradients."""
        return squares

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor like the parameter, from its parts on all ranks."""
        return tensor

    def part(self, name: str, array: np.ndarray) -> np.ndarray:
        """This rank's part of a whole array."""
        return array

    def backward(
        self, run: Callable[[], Tensor], scale: float, loss_scale: float, last: bool
    ) -> Tensor:
        """Call `run`, and backward from its value times both scales; returns the value."""
        value = run()
        if value.requires_grad:
            (value * (scale * loss_scale)).backward()
            if not last:
                self._separate()
        return value

    # --- the update ---------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, rates: Mapping[str, float], loss_scale: float) -> Norms:
        """As `Engine.update`, for gradients that are `loss_scale` times too large."""
        self._exchange()
        for name, parameter in self.parameters.items():
            local = self.local[name]
            found = parameter.grad
            local.grad = torch.zeros_like(local) if found is None else self._local(found)
        norms = self._norms(loss_scale)
        if not norms.skipped:
            self._step(rates, self._factor(norms.total, loss_scale))
        for name, parameter in self.parameters.items():
            parameter.grad = self.local[name].grad = None
        return norms

    def _gradients(self, group: Group) -> list[Tensor]:
        return [self.local[name].grad for name in group.parameters if self.local[name].numel()]

    def _norms(self, loss_scale: float) -> Norms:
        norms = [
            torch.nn.utils.get_total_norm(found).float()
            if (found := self._gradients(group))
            else torch.zeros((), device=ops.DEVICE)
            for group in self.groups
        ]
        squares = self._sum(torch.stack(norms).square()).cpu().double().tolist()
        sizes = [math.sqrt(square) / loss_scale for square in squares]
        total = math.sqrt(sum(squares)) / loss_scale
        groups = {group.name: size for group, size in zip(self.groups, sizes, strict=True)}
        return Norms(total, groups, skipped=not math.isfinite(total))

    def _factor(self, norm: float, loss_scale: float) -> float:
        clip = 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))
        return clip / loss_scale

    def _step(self, rates: Mapping[str, float], factor: float) -> None:
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            settings["lr"] = rates[group.name]
            if factor != 1.0 and settings["params"]:
                torch._foreach_mul_(self._gradients(group), factor)
        self.optimizer.step()

    # --- state --------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
        """(name, kind, how to get it whole) of all state; getting it is collective."""
        for name, local in self.local.items():
            held = {**self.state[name], "parameter": local.detach()}
            for kind in KINDS:
                yield name, kind, lambda name=name, tensor=held[kind]: self.whole(name, tensor)

    @torch.no_grad()
    def restore(self, steps: int, read: Callable[[str, str], np.ndarray]) -> None:
        for name, local in self.local.items():
            held = {**self.state[name], "parameter": local}
            for kind in KINDS:
                held[kind].copy_(torch.from_numpy(self.part(name, read(name, kind))))
            self.state[name]["step"].fill_(steps)


class DataParallel(Single):
    """DistributedDataParallel: the whole module on every rank."""

    def _wrap(self, module: torch.nn.Module) -> Callable[..., Tensor]:
        self.exchanged = False
        self.ddp = torch.nn.parallel.DistributedDataParallel(
            _WithSpare(module),
            device_ids=None if ops.DEVICE.type == "cpu" else [ops.DEVICE],
            # A batch need not use every parameter (no newline in it, blocks behind the feature).
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        self.ddp.register_comm_hook(None, _sum_bucket)
        return self.ddp

    def backward(
        self, run: Callable[[], Tensor], scale: float, loss_scale: float, last: bool
    ) -> Tensor:
        self.exchanged = last
        with nullcontext() if last else self.ddp.no_sync():
            return super().backward(run, scale, loss_scale, last)

    def _exchange(self) -> None:
        if self.exchanged:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in self.parameters.values()]):
            joined = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(joined)
            parts = joined.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


class _WithSpare(torch.nn.Module):
    """The module, and a parameter that nothing uses.

    Where all are used, DDP warns in every run that it looked for unused ones in vain.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.spare = torch.nn.Parameter(torch.zeros(1, device=ops.DEVICE))

    def forward(self, *tensors: Tensor | None) -> Tensor:
        return self.module(*tensors)


def _sum_bucket(state, bucket):
    """DDP's exchange without its division: gradients are sums over the ranks.

    Not annotated: DDP refuses annotations that are strings.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(part.nbytes for part in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class FullySharded(Single):
    """FSDP2 (`fully_shard`, arXiv 2304.11277): each rank keeps a slice of every parameter.

    A group per block of a ModuleList, and one for what is left (embeddings, head, projector).
    Gradients are exchanged and sharded in every micro-batch: no rank ever holds all of them.

    The module may come without values: `runtime.assign` then gives each rank its share, and no
    rank ever holds more than that and one block.
    """

    options = ("reshard_after_forward",)

    def _wrap(
        self, module: torch.nn.Module, reshard_after_forward: bool = True
    ) -> Callable[..., Tensor]:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.device_mesh.init_device_mesh(ops.DEVICE.type, (dist.get_world_size(),))
        mixed = ops.COMPUTE != torch.float32
        settings = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=ops.COMPUTE if mixed else None,
                reduce_dtype=torch.float32 if mixed else None,
                # Rotary tables and loss weights stay float32.
                cast_forward_inputs=False,
            ),
        }
        for block in blocks(module):
            _make_room(block)
            fully_shard(block, reshard_after_forward=reshard_after_forward, **settings)
        _make_room(module)
        fully_shard(module, **settings)
        for part in (*blocks(module), module):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):  # since torch 2.13
            module.set_reduce_scatter_unused_params(True)
        return module

    def _separate(self) -> None:
        """Reduced gradients lie apart."""

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to_local()

    def _sum(self, squares: Tensor) -> Tensor:
        dist.all_reduce(squares)
        return squares

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        like = self.parameters[name]
        return dist.tensor.DTensor.from_local(
            tensor,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        ).full_tensor()

    def part(self, name: str, array: np.ndarray) -> np.ndarray:
        return own_rows(self.parameters[name], array)


def _make_room(module: torch.nn.Module) -> None:
    """Memory for the parameters that have none, as yet without values."""
    for part in module.modules():
        for name, held in part.named_parameters(recurse=False):
            if held.is_meta:
                empty = torch.empty_like(held, device=ops.DEVICE)
                setattr(part, name, torch.nn.Parameter(empty, held.requires_grad))


def _known(options: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The options, if the strategy knows them all.

    Raises BackendError: it does not.
    """
    unknown = [name for name in options if name not in names]
    if unknown:
        raise BackendError(
            f"unknown options of the strategy: {', '.join(unknown)}",
            expected=f"some of {', '.join(names)}" if names else "none",
        )
    return options
