"""transformers' own LLaVA models, as the independent reference of `unillava parity`.

Takes paths and NumPy arrays in the form of transformers' processors, gives NumPy arrays under
the canonical names of modules and parameters. Understands the module trees of transformers 4.46
to 5.x.

Shape letters: B rows, S positions, V vocabulary, T tiles, C width, G patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from backends.errors import BackendError
from backends.torch import ops, runtime

Arrays = dict[str, np.ndarray]
Record = Callable[[str, np.ndarray], None]

_ATTENTION = {"auto": "sdpa", "portable": "eager"}

_RENAMES = (
    # transformers 4.52 put everything but the head under `model.`; 5.x names the vision tower
    # without `vision_model.`; before 4.52 the decoder was `language_model.model.`.
    (r"^model\.", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head)", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
)


def canonical(name: str) -> str:
    """transformers' name of a module or parameter in memory as that of the hub's files."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class Reference:
    """One of transformers' LLaVA classes on the device and in the dtype in force."""

    def __init__(self, directory: str, watched: frozenset[str]) -> None:
        """Load a checkpoint directory.

        Args:
            directory: in the Hugging Face layout, on this machine.
            watched: canonical names of the modules whose outputs `forward` records.

        Raises:
            BackendError: transformers cannot load it, or finds parameters missing.
        """
        self.watched = watched
        try:
            self.model, info = transformers.AutoModelForImageTextToText.from_pretrained(
                directory, local_files_only=True, output_loading_info=True
            )
        except (ValueError, KeyError, OSError, AttributeError) as error:
            raise BackendError(
                f"transformers {transformers.__version__} cannot load this checkpoint",
                given=str(error).splitlines()[0],
                expected="a LLaVA, LLaVA-NeXT or LLaVA-NeXT-Video checkpoint, transformers >= 4.46",
            ) from error
        if info["missing_keys"]:
            raise BackendError(
                "transformers finds parameters missing that it would fill at random",
                given=", ".join(sorted(info["missing_keys"])[:5]),
            )
        self.model = self.model.to(runtime.tensor(np.zeros(0, np.float32)).dtype)
        self.model = self.model.to(ops.DEVICE).eval()
        # Every reply has the same length, whatever it says.
        self.model.generation_config.eos_token_id = None

    def use_kernels(self, kernels: str) -> None:
        """auto: scaled_dot_product_attention; portable: transformers' eager attention.

        transformers before 4.53 cannot switch a loaded model and keeps what it chose.
        """
        if hasattr(self.model, "set_attn_implementation"):
            self.model.set_attn_implementation(_ATTENTION[kernels])

    def forward(self, batch: Arrays, record: Record) -> None:
        """Run the model once; outputs of the watched modules, `merge` and `logits` to `record`."""
        phases = ["@video"] * ("pixel_values_videos" in batch)
        phases = [""] * ("pixel_values" in batch) + phases
        now = {"phase": ""}

        def on_tower(module: Any, args: Any) -> None:
            now["phase"] = phases.pop(0)

        def on_projector(module: Any, args: Any) -> None:
            # The tower's own output is a dataclass; this is what LLaVA takes of it. The frames
            # of a video are pooled by then.
            if not now["phase"]:
                record("vision_tower", runtime.numpy(args[0]))

        def on_decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            now["phase"] = ""
            record("merge", runtime.numpy(kwargs["inputs_embeds"]))

        def on_output(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                record(name + now["phase"], runtime.numpy(_rows(output)))

            return hook

        base = getattr(self.model, "model", self.model)
        handles = [
            base.vision_tower.register_forward_pre_hook(on_tower),
            base.multi_modal_projector.register_forward_pre_hook(on_projector),
            base.language_model.register_forward_pre_hook(on_decoder, with_kwargs=True),
        ]
        for name, module in self.model.named_modules():
            known_as = canonical(name)
            if known_as in self.watched and known_as != "vision_tower":
                handles.append(module.register_forward_hook(on_output(known_as)))
        try:
            with torch.inference_mode():
                logits_BSV = self._run(batch).logits
        finally:
            for handle in handles:
                handle.remove()
        record("logits", runtime.numpy(logits_BSV))

    def loss(self, batch: Arrays) -> float:
        """Mean loss of the learnt tokens, by transformers' own loss function."""
        with torch.inference_mode():
            return float(self._run(batch).loss)

    def gradients(self, batch: Arrays) -> tuple[float, Arrays]:
        """The loss, and its gradient with respect to each parameter by canonical name."""
        self.model.zero_grad(set_to_none=True)
        loss = self._run(batch).loss
        loss.backward()
        found = {}
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            parameter.grad = None
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            found[canonical(name)] = runtime.numpy(gradient)
        return float(loss), found

    def greedy(self, prompt: Arrays, count: int) -> tuple[list[int], list[float]]:
        """`count` tokens by `generate`, and by how much the best logit led each time."""
        inputs = self._tensors(prompt)
        generated = self.model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = generated.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = [logits_1V[0].float().topk(2).values for logits_1V in generated.logits]
        return tokens, [float(first - second) for first, second in best]

    def _run(self, batch: Arrays) -> Any:
        return self.model(**self._tensors(batch), use_cache=False)

    def _tensors(self, batch: Arrays) -> dict[str, torch.Tensor]:
        return {name: runtime.tensor(array) for name, array in batch.items()}


def _rows(output: Any) -> torch.Tensor:
    """A module's first output; the patch convolution's map [T, C, h, w] as rows [T, G, C]."""
    x = output[0] if isinstance(output, tuple) else output
    return x.flatten(2).mT if x.ndim == 4 else x
