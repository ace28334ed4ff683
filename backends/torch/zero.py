"""DeepSpeed's ZeRO stages 2 and 3 (arXiv 1910.02054).

DeepSpeed keeps the parameters in the compute dtype and their float32 originals, with the
moments, in flat shards. Its own AdamW is replaced by torch's fused one: the same mathematics,
nothing to compile. Exchange, clipping and the step are DeepSpeed's.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.contract import AdamW, Group, Norms
from backends.errors import BackendError
from backends.torch import native, ops

RECIPE_DECIDES = (
    *("optimizer", "scheduler", "bf16", "fp16", "gradient_clipping"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)
"""Keys of a DeepSpeed configuration that are not taken from it."""


class Zero:
    """A module in DeepSpeed's engine.

    `options` is a DeepSpeed configuration, as its JSON says it: what the recipe decides is not
    taken from it, nor entries that are "auto".
    """

    def __init__(
        self,
        stage: int,
        module: torch.nn.Module,
        groups: Sequence[Group],
        settings: AdamW,
        options: Mapping[str, Any],
    ) -> None:
        deepspeed = _deepspeed()
        if ops.COMPUTE == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
            raise BackendError(
                f"float16 is not supported by DeepSpeed on device {ops.DEVICE.type!r}",
                expected="bfloat16 or float32",
                fix="pass --dtype with one of these, or use --strategy fsdp",
            )
        self.stage, self.groups = stage, [group for group in groups if group.parameters]
        self.all_groups = tuple(group.name for group in groups)
        parameters = dict(module.named_parameters())
        names = [name for group in self.groups for name in group.parameters]
        self.parameters = {name: parameters[name] for name in names}
        self.originals = self._copies()
        config = _configuration(stage, settings, options)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._adamw(settings),
            config=config,
            dist_init_required=False,
        )
        self.zero = self.engine.optimizer
        self.forward = self.engine
        self.recorded: list[Tensor] = []
        for method in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            self._record(method)
        self._make_state()
        for name, array in self.originals.items():
            self._write(name, "parameter", array)
        del self.originals

    def _copies(self) -> dict[str, np.ndarray]:
        """Trained parameters before DeepSpeed rounds them to the compute dtype."""
        if ops.COMPUTE == torch.float32:
            return {}
        return {name: p.detach().cpu().numpy() for name, p in self.parameters.items()}

    def _adamw(self, settings: AdamW) -> torch.optim.AdamW:
        groups = [
            {
                "params": [self.parameters[name] for name in group.parameters],
                "weight_decay": group.weight_decay,
            }
            for group in self.groups
        ]
        fused = ops.DEVICE.type in native.FUSED_DEVICES
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=settings.eps, fused=fused, foreach=not fused
        )

    def _record(self, method: str) -> None:
        """Keep what DeepSpeed measures of each group on the way to the global norm."""
        measure = getattr(self.zero, method)

        def measured(*args: Any, **kwargs: Any) -> Tensor:
            norm = measure(*args, **kwargs)
            self.recorded.append(norm)
            return norm

        setattr(self.zero, method, measured)

    # --- the update ---------------------------------------------------------------------------

    def backward(
        self, run: Callable[[], Tensor], scale: float, loss_scale: float, last: bool
    ) -> Tensor:
        """Call `run`, and backward from its value times both scales; returns the value."""
        if ops.COMPUTE == torch.float16:
            self.zero.override_loss_scale(loss_scale)
        value = run()
        # DeepSpeed averages over the ranks; the contract wants the sum.
        self.engine.backward(value * (scale * dist.get_world_size()), scale_wrt_gas=False)
        return value

    def update(self, rates: Mapping[str, float], loss_scale: float) -> Norms:
        """As `Engine.update`, for gradients that are `loss_scale` times too large."""
        for group, settings in zip(self.groups, self.zero.optimizer.param_groups, strict=True):
            settings["lr"] = rates[group.name]
        self.recorded.clear()
        self.engine.step()
        if self.stage == 3:
            # Kept until a new gradient overwrites it: one that never comes would count again.
            self.zero.grad_partitions_flat_buffer.zero_()
        return self._norms(loss_scale)

    def _norms(self, loss_scale: float) -> Norms:
        squares = dict.fromkeys(self.all_groups, 0.0)
        for n, norm in enumerate(self.recorded):
            group = self.groups[self.zero.sub_group_to_group_id[n] if self.stage == 3 else n]
            # DeepSpeed says -1 for a norm that is not finite.
            squares[group.name] += float(norm) ** 2 if norm >= 0 else math.inf
        if self.zero.overflow:
            unknown = not self.recorded
            groups = {n: math.inf if unknown else math.sqrt(s) for n, s in squares.items()}
            return Norms(math.inf, groups, skipped=True)
        groups = {name: math.sqrt(square) / loss_scale for name, square in squares.items()}
        return Norms(math.sqrt(sum(squares.values())) / loss_scale, groups)

    # --- state --------------------------------------------------------------------------------

    def _flat(self) -> list[Tensor]:
        """The float32 shards that the optimizer works on."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups

    def _make_state(self) -> None:
        """Moments of zero from the start: DeepSpeed has none before the first step."""
        for flat in self._flat():
            fused = flat.device.type in native.FUSED_DEVICES
            self.zero.optimizer.state[flat] = native.new_state(flat, fused)
        if self.stage == 2:
            self.zero._lazy_init_hp_params_optimizer_state()

    def tensors(self) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
        for name in self.parameters:
            for kind in native.KINDS:
                yield name, kind, lambda name=name, kind=kind: self._read(name, kind)

    def _read(self, name: str, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == "parameter":
            return safe_get_full_fp32_param(self.parameters[name]).detach()
        return safe_get_full_optimizer_state(self.parameters[name], kind)

    def restore(self, steps: int, read: Callable[[str, str], np.ndarray]) -> None:
        for name in self.parameters:
            for kind in native.KINDS:
                self._write(name, kind, read(name, kind))
        for flat in self._flat():
            self.zero.optimizer.state[flat]["step"].fill_(steps)
        self._refresh()

    @torch.no_grad()
    def _write(self, name: str, kind: str, array: np.ndarray) -> None:
        parameter, key = self.parameters[name], None if kind == "parameter" else kind
        if self.stage == 2:
            parameter.set_full_hp_param(torch.from_numpy(np.ascontiguousarray(array)), key)
            return
        size = parameter.ds_tensor.numel()
        start = dist.get_rank() * size
        mine = array.reshape(-1)[start : start + size]
        # The last ranks' shards are filled up with zeros.
        shard = torch.from_numpy(np.pad(mine, (0, size - mine.size)))
        self.zero.set_local_hp_param(shard, parameter, key)

    @torch.no_grad()
    def _refresh(self) -> None:
        """The parameters that the module computes with, from the float32 ones."""
        if self.stage == 2:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for n in range(len(self._flat())):
            self.zero._reassign_or_swap_out_partitioned_parameters(n)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def _deepspeed() -> ModuleType:
    """The package, told which device it is for, and quiet.

    Raises BackendError: not installed, or too old.
    """
    os.environ.setdefault("DS_ACCELERATOR", ops.DEVICE.type)
    os.environ.setdefault("LOCAL_RANK", str(ops.DEVICE.index or 0))
    fix = 'pip install "unillava[deepspeed]"'
    try:
        import deepspeed
        import deepspeed.runtime.constants as constants
    except ImportError as error:
        raise BackendError("DeepSpeed is not installed here", fix=fix) from error
    if not hasattr(constants, "MANAGED_GRADIENT_ACCUMULATION"):
        raise BackendError(
            "DeepSpeed is too old", given=deepspeed.__version__, expected="0.19.8 or newer", fix=fix
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if ops.DEVICE.type == "cpu":
        # DeepSpeed would compile an exchange through shared memory, in which the others wait
        # forever for a rank that has died.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _configuration(stage: int, settings: AdamW, options: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration from the recipe and the user's.

    Raises BackendError: the user's is for another stage, or asks for what is not supported.
    """
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Micro-batches of an update are counted by its callers: `step` is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.clip_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": ops.COMPUTE == torch.bfloat16},
        # A loss scale of 1: the engine overrides it with its own.
        "fp16": {"enabled": ops.COMPUTE == torch.float16, "loss_scale": 1.0},
        "zero_optimization": {"stage": stage},
    }
    theirs = _without_auto({k: v for k, v in options.items() if k not in RECIPE_DECIDES})
    given = theirs.get("zero_optimization", {})
    if given.get("stage", stage) != stage:
        raise BackendError(
            f"a DeepSpeed configuration of stage {given['stage']} for strategy 'zero{stage}'",
            fix=f"use --strategy zero{given['stage']}, or a configuration of stage {stage}",
        )
    if given.get("offload_optimizer", {}).get("device") == "nvme":
        raise BackendError("optimizer state on NVMe is not supported", expected="cpu or none")
    return _merged(ours, theirs)


def _without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that transformers would fill in are left to DeepSpeed's defaults."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in options.items()
        if value != "auto"
    }


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(old, value) if both else value
    return result
