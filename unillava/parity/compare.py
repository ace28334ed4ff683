"""How far two computations of the same thing are apart, and where they part. NumPy only.

A tensor's difference is judged relative to the reference tensor's largest absolute value: that
is the scale at which the next layer sees it. The bars of section 5 of the design and those of
the official guides are data (`rules`), so that each is printed with what was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CHUNK = 1 << 22
"""Elements that are looked at at a time: compared tensors may be mapped from disk."""

GROWTH = 10.0
"""A difference that is this many times larger than all before it does not come from them."""

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TOLERANCE = {"float32": 1e-5, "float16": 8e-2, "bfloat16": 6e-1}
"""Bars relative to a tensor's largest value: in each dtype some 80 units of rounding. In half
precision that shows gross faults only; the reference's own noise and sudden jumps tell more."""


@dataclass(frozen=True)
class Difference:
    """One tensor against the reference's."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    cosine: float
    """1 for equal direction; 1 if both tensors are zero."""
    scale: float
    """What `max_abs` is divided by: as a rule the reference's largest absolute value."""
    worst: tuple[int, ...] = ()
    """Index of the largest difference."""
    finite: bool = True
    """Whether all values of both are finite; otherwise max_abs and mean_abs are infinite."""

    @property
    def relative(self) -> float:
        """`max_abs / scale`; infinite if only the reference is zero."""
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.scale if self.scale else math.inf

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        fields = asdict(self) | {"relative": self.relative}
        return {name: or_null(value) for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Difference:
        """The inverse of `to_json`."""
        kept = {k: math.inf if v is None else v for k, v in fields.items() if k != "relative"}
        return cls(**kept | {"shape": tuple(kept["shape"]), "worst": tuple(kept["worst"])})


def difference(
    name: str, reference: np.ndarray, found: np.ndarray, *, scale: float | None = None
) -> Difference:
    """Compare two arrays of one shape, in float64, chunk by chunk.

    Args:
        name: of the tensor.
        reference, found: float arrays; may be memory-mapped, at most CHUNK elements of each are
            copied at a time.
        scale: what the largest difference is relative to; None: the reference's largest
            absolute value.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != found.shape:
        raise ValueError(f"{name}: shape {found.shape}, the reference has {reference.shape}")
    flat_a, flat_b = reference.reshape(-1), found.reshape(-1)
    top, largest, total, worst = 0.0, 0.0, 0.0, 0
    dot = norm_a = norm_b = 0.0
    for start in range(0, flat_a.size, CHUNK):
        a = np.asarray(flat_a[start : start + CHUNK], np.float64)
        b = np.asarray(flat_b[start : start + CHUNK], np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return _not_finite(name, reference.shape, start, a, b)
        gap = np.abs(a - b)
        place = int(gap.argmax())
        if gap[place] > largest:
            largest, worst = float(gap[place]), start + place
        top = max(top, float(np.abs(a).max()))
        total += float(gap.sum())
        dot, norm_a, norm_b = dot + float(a @ b), norm_a + float(a @ a), norm_b + float(b @ b)
    lengths = math.sqrt(norm_a * norm_b)
    return Difference(
        name=name,
        shape=tuple(reference.shape),
        max_abs=largest,
        mean_abs=total / max(flat_a.size, 1),
        cosine=dot / lengths if lengths else float(norm_a == norm_b),
        scale=top if scale is None or not math.isfinite(scale) else scale,
        worst=_index(worst, reference.shape),
    )


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in shape:
        return ()
    return tuple(int(n) for n in np.unravel_index(flat, shape))


def _not_finite(
    name: str, shape: tuple[int, ...], start: int, a: np.ndarray, b: np.ndarray
) -> Difference:
    place = start + int((~(np.isfinite(a) & np.isfinite(b))).argmax())
    return Difference(name, tuple(shape), math.inf, math.inf, 0.0, 1.0, _index(place, shape), False)


# --- names -----------------------------------------------------------------------------------

_BLOCK = re.compile(
    r"(?P<block>(?:vision_tower\.vision_model\.encoder|language_model\.model)\.layers\.\d+)"
    r"(?P<inside>\.[^@]*)?(?P<phase>@\w+)?$"
)
_PARTS = (
    ("vision_tower", "vision"),
    ("multi_modal_projector", "projector"),
    ("image_newline", "newline"),
    ("merge", "merge"),
    ("language_model.model.embed_tokens", "embedding"),
    ("language_model.model.layers", "decoder"),
    ("language_model.model.norm", "final norm"),
    ("language_model.lm_head", "head"),
    ("logits", "logits"),
)
PARTS = tuple(part for _, part in _PARTS)
"""Parts of the model in the order in which they are run."""

STEPS = {
    "patch_embedding": "the patch convolution",
    "embeddings": "class token and position embedding",
    "pre_layrnorm": "layer norm",
    "layer_norm1": "layer norm",
    "layer_norm2": "layer norm",
    "input_layernorm": "RMS norm",
    "post_attention_layernorm": "the residual sum after attention, RMS norm",
    "q_proj": "linear",
    "k_proj": "linear",
    "v_proj": "linear",
    "out_proj": "attention, then linear",
    "o_proj": "rotary embedding and attention, then linear",
    "self_attn": "what follows the last linear of attention",
    "gate_proj": "linear",
    "up_proj": "linear",
    "down_proj": "activation, then linear",
    "fc1": "linear",
    "fc2": "activation, then linear",
    "mlp": "what follows the last linear of the MLP",
    "linear_1": "linear",
    "multi_modal_projector": "what follows the last linear of the projector",
    "vision_tower": "the choice of layers and rows",
    "embed_tokens": "the lookup of text rows",
    "merge": "the gather of text, image, video and newline rows",
    "norm": "RMS norm",
    "logits": "the output head",
}
"""Last component of a module's name -> what is computed between it and the tensor before it."""


def part_of_tensor(name: str) -> str:
    """The part of the model (one of PARTS) that an output or a gradient belongs to."""
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part
    raise ValueError(f"{name} belongs to no part of the model")


def layer_of(name: str) -> str:
    """The block that a tensor lies in, or the tensor itself outside of blocks."""
    found = _BLOCK.match(name)
    return found["block"] + (found["phase"] or "") if found else name


def step_of(name: str) -> str:
    """What is computed just before this output, in words."""
    leaf = name.partition("@")[0].rsplit(".", 1)[-1]
    if leaf.isdigit():
        return "the residual sum after the MLP"
    if leaf.startswith("linear_"):
        return STEPS.get(leaf, "activation, then linear")
    return STEPS[leaf]


def gradient_scale_name(name: str) -> str:
    """The gradient whose largest value a gradient is compared with; as a rule its own.

    The key bias of the vision tower shifts all scores of a query by one number, which softmax
    does not see: its gradient is zero in exact arithmetic and what is left is rounding. It is
    compared with the gradient of the key weight, a sum over the same terms.
    """
    if name.startswith("vision_tower.") and name.endswith("k_proj.bias"):
        return name.removesuffix("bias") + "weight"
    return name


# --- where two runs part ---------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in the order of execution, that is over the bar."""

    name: str
    layer: str
    step: str
    relative: float
    before: str | None
    """The last tensor before it that is within the bar."""
    jump: str | None
    """Where a difference first exceeds what the tensors before it explain; None: nowhere, it
    grew steadily."""
    jump_factor: float = 0.0
    """How many times larger it is there than the growth expected of rounding allows for."""


def first_divergence(
    outputs: Sequence[Difference],
    tolerance: float,
    *,
    noise: Mapping[str, float] | None = None,
    epsilon: float = EPSILON["float32"],
) -> Divergence | None:
    """The first output over `tolerance`, and the first that its predecessors do not explain.

    Rounding differences are carried on and grow from layer to layer, slowly. So a difference is
    unexpected where it is more than GROWTH times the largest before it, the reference's own
    `noise` in that tensor and four units of rounding.
    """
    over = next((n for n, d in enumerate(outputs) if not d.relative <= tolerance), None)
    if over is None:
        return None
    found = outputs[over]
    # Tensors are recorded when they are finished, so the one before may lie in another part.
    before = outputs[over - 1].name if over else None
    jump, factor = first_jump(outputs[: over + 1], noise or {}, epsilon)
    return Divergence(
        name=found.name,
        layer=layer_of(found.name),
        step=step_of(found.name),
        relative=found.relative,
        before=before,
        jump=jump,
        jump_factor=factor,
    )


def first_jump(
    outputs: Iterable[Difference], noise: Mapping[str, float], epsilon: float
) -> tuple[str | None, float]:
    """Name and factor of the first difference beyond the expected growth; see above."""
    largest = 4 * epsilon
    for d in outputs:
        expected = GROWTH * max(largest, noise.get(d.name, 0.0))
        if not d.relative <= expected:
            return d.name, d.relative / expected
        largest = max(largest, d.relative)
    return None, 0.0


def worst(differences: Iterable[Difference]) -> Difference | None:
    """The largest relative difference; None of none."""
    return max(differences, key=lambda d: d.relative, default=None)


def worst_by_part(differences: Iterable[Difference]) -> dict[str, Difference]:
    """The largest relative difference of each part that occurs, in the order of PARTS."""
    found: dict[str, Difference] = {}
    for d in differences:
        part = part_of_tensor(d.name)
        if part not in found or d.relative > found[part].relative:
            found[part] = d
    return {part: found[part] for part in PARTS if part in found}


# --- one run against the reference -----------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave, compared with the reference's first."""

    kernels: str
    loss: float
    outputs: tuple[Difference, ...] = ()
    """In the order of execution; empty for the reference's first run itself."""
    gradients: tuple[Difference, ...] = ()
    gradient_norm: float | None = None
    """Global 2-norm of all gradients; None if there are none."""

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "kernels": self.kernels,
            "loss": or_null(self.loss),
            "gradient_norm": or_null(self.gradient_norm),
            "has_gradients": self.gradient_norm is not None,
            "outputs": [d.to_json() for d in self.outputs],
            "gradients": [d.to_json() for d in self.gradients],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Run:
        """The inverse of `to_json`."""
        return cls(
            kernels=fields["kernels"],
            loss=_or_nan(fields["loss"]),
            gradient_norm=_or_nan(fields["gradient_norm"]) if fields["has_gradients"] else None,
            outputs=tuple(Difference.from_json(d) for d in fields["outputs"]),
            gradients=tuple(Difference.from_json(d) for d in fields["gradients"]),
        )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def in_order(differences: Iterable[Difference], order: Sequence[str]) -> tuple[Difference, ...]:
    """Sorted by place in `order`; unknown names last, by name."""
    places = {name: n for n, name in enumerate(order)}
    return tuple(sorted(differences, key=lambda d: (places.get(d.name, len(places)), d.name)))


def execution_order(parameters: Iterable[str], outputs: Sequence[str]) -> list[str]:
    """Parameter names in the order in which their modules are run.

    A parameter belongs to the output of its own module, or else (class token, newline) of the
    nearest module around it that has one.
    """
    places = {name: n for n, name in enumerate(outputs)}

    def place(name: str) -> int:
        if name == "image_newline":
            return places.get("merge", len(places))
        owner = name.rpartition(".")[0]
        if owner == "language_model.lm_head":
            return places.get("logits", len(places))
        while owner and owner not in places:
            owner = owner.rpartition(".")[0]
        return places.get(owner, len(places))

    return sorted(parameters, key=place)


def noise_band(runs: Iterable[Run]) -> tuple[dict[str, float], dict[str, float]]:
    """Largest relative difference of each output and each gradient over the reference's repeats."""
    outputs: dict[str, float] = {}
    gradients: dict[str, float] = {}
    for run in runs:
        for band, differences in ((outputs, run.outputs), (gradients, run.gradients)):
            for d in differences:
                band[d.name] = max(band.get(d.name, 0.0), d.relative)
    return outputs, gradients


# --- greedy tokens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """Where two greedy replies part."""

    row: int
    step: int
    reference: int
    found: int
    gap: float | None
    """By how much the reference's best logit led there; None: not finite."""


def first_mismatch(
    reference: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float | None]],
) -> Mismatch | None:
    """The first token of the first row that differs; all rows are equally long."""
    for row, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        for step, (a, b) in enumerate(zip(wanted, got, strict=True)):
            if a != b:
                return Mismatch(row, step, a, b, gaps[row][step])
    return None


# --- bars ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """The numbers that guides ask for, of one run against the reference."""

    loss_abs: float
    loss_relative: float
    norm_relative: float | None
    logits_mean_abs: float
    outputs_relative: float
    outputs_max_abs: float
    outputs_cosine: float
    gradients_relative: float | None
    gradients_mean_abs: float | None
    tokens_equal: bool | None


def facts_of(run: Run, reference: Run, tokens_equal: bool | None) -> Facts:
    """Gather the facts; those about gradients are None where there are none."""
    loss_abs = abs(run.loss - reference.loss)
    norm = None
    if run.gradient_norm is not None and reference.gradient_norm is not None:
        norm = _ratio(abs(run.gradient_norm - reference.gradient_norm), reference.gradient_norm)
    by_name = {d.name: d for d in run.outputs}
    return Facts(
        loss_abs=loss_abs,
        loss_relative=_ratio(loss_abs, abs(reference.loss)),
        norm_relative=norm,
        logits_mean_abs=by_name["logits"].mean_abs,
        outputs_relative=max(d.relative for d in run.outputs),
        outputs_max_abs=max(d.max_abs for d in run.outputs),
        outputs_cosine=min(d.cosine for d in run.outputs),
        gradients_relative=max((d.relative for d in run.gradients), default=None),
        gradients_mean_abs=max((d.mean_abs for d in run.gradients), default=None),
        tokens_equal=tokens_equal,
    )


def worst_facts(all_facts: Sequence[Facts]) -> Facts | None:
    """The worst of each number over several runs; None of none."""
    if not all_facts:
        return None
    merged = all_facts[0]
    for facts in all_facts[1:]:
        merged = Facts(**{k: _worse(k, v, getattr(facts, k)) for k, v in vars(merged).items()})
    return merged


def _worse(field: str, a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    # A cosine and an equality are worse when smaller, every other number when larger.
    return min(a, b) if field in ("outputs_cosine", "tokens_equal") else max(a, b)


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


@dataclass(frozen=True)
class Rule:
    """One bar: of which guide, on which number, and what it asks."""

    guide: str
    criterion: str
    bar: str
    fact: str
    """The number that is shown."""
    passes: Callable[[Facts], bool]
    note: str = ""
    decides: bool = False
    """Whether the verdict and the exit code depend on it."""


@dataclass(frozen=True)
class Judgement:
    """One rule applied to one backend."""

    rule: Rule
    measured: float | bool | None
    passed: bool | None
    """None: not measured in this run."""
    noise: float | bool | None = None
    """The same number for the reference against itself."""
    noise_passed: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "guide": self.rule.guide,
            "criterion": self.rule.criterion,
            "bar": self.rule.bar,
            "note": self.rule.note,
            "decides": self.rule.decides,
            "measured": or_null(self.measured),
            "passed": self.passed,
            "reference_against_itself": or_null(self.noise),
            "reference_against_itself_passed": self.noise_passed,
        }


GUIDES = {
    "unillava": "this project's own bars; the verdict and the exit code depend on these alone",
    "MindSpore": "Large Model Migration Precision Standard (mindspore-ai/docs, "
    "mindformers/docs/…/precision_optimization.md)",
    "Paddle": "reproduction guide (PaddlePaddle/models, docs/lwfx/ArticleReproduction_CV.md "
    "and _NLP.md)",
    "Ascend compare": "PyTorch accuracy comparison of CANN 7.0 (per-API criteria)",
}
"""Where the bars come from."""

_ONE_STEP = "the guide takes the mean of a training run; this is its first step"
_ABSOLUTE = "absolute: depends on how large the model's numbers are"


def rules(tolerance: float) -> tuple[Rule, ...]:
    """Every bar, our own first; `tolerance` is that of our own."""
    ours, bar = "unillava", f"≤ {short(tolerance)}"
    relative = "largest difference / tensor's largest value"
    return (
        Rule(
            ours, "every output", bar, "outputs_relative",
            lambda f: f.outputs_relative <= tolerance, relative, True,
        ),
        Rule(
            ours, "loss", bar, "loss_relative",
            lambda f: f.loss_relative <= tolerance, "relative difference", True,
        ),
        Rule(
            ours, "every gradient", bar, "gradients_relative",
            lambda f: f.gradients_relative <= tolerance, relative, True,
        ),
        Rule(ours, "greedy tokens", "equal", "tokens_equal", lambda f: f.tokens_equal, "", True),
        Rule(
            "MindSpore", "first loss", "abs < 0.005 or rel < 0.5 %", "loss_abs",
            lambda f: f.loss_abs < 0.005 or f.loss_relative < 0.005,
        ),
        Rule(
            "MindSpore", "mean loss", "abs < 0.01 or rel < 1 %", "loss_abs",
            lambda f: f.loss_abs < 0.01 or f.loss_relative < 0.01, _ONE_STEP,
        ),
        Rule(
            "MindSpore", "global gradient norm, mean relative", "≤ 10 %", "norm_relative",
            lambda f: f.norm_relative <= 0.1, _ONE_STEP,
        ),
        Rule(
            "Paddle", "forward, mean absolute", "≤ 1e-6", "logits_mean_abs",
            lambda f: f.logits_mean_abs <= 1e-6, _ABSOLUTE,
        ),
        Rule(
            "Paddle", "forward, mean absolute (newer text)", "≤ 1e-5", "logits_mean_abs",
            lambda f: f.logits_mean_abs <= 1e-5, _ABSOLUTE,
        ),
        Rule(
            "Paddle", "loss log", "≤ 1e-6", "loss_abs", lambda f: f.loss_abs <= 1e-6, _ABSOLUTE
        ),
        Rule(
            "Paddle", "backward log", "≤ 1e-6", "gradients_mean_abs",
            lambda f: f.gradients_mean_abs <= 1e-6,
            "the guide logs the losses of the steps that follow; this is the worst mean absolute "
            "difference of a gradient",
        ),
        Rule(
            "Ascend compare", "cosine of every output", "> 0.99", "outputs_cosine",
            lambda f: f.outputs_cosine > 0.99,
        ),
        Rule(
            "Ascend compare", "largest absolute error of every output", "< 0.001",
            "outputs_max_abs", lambda f: f.outputs_max_abs < 0.001, _ABSOLUTE,
        ),
        Rule(
            "Ascend compare", "not an outright error: cosine", "≥ 0.9", "outputs_cosine",
            lambda f: f.outputs_cosine >= 0.9,
        ),
        Rule(
            "Ascend compare", "not an outright error: largest absolute", "≤ 1",
            "outputs_max_abs", lambda f: f.outputs_max_abs <= 1,
        ),
    )  # fmt: skip


def judge(facts: Facts, noise: Facts | None, tolerance: float) -> tuple[Judgement, ...]:
    """Apply every rule; what was not measured neither passes nor fails."""
    return tuple(
        Judgement(rule, *_apply(rule, facts), *_apply(rule, noise)) for rule in rules(tolerance)
    )


def _apply(rule: Rule, facts: Facts | None) -> tuple[float | bool | None, bool | None]:
    measured = None if facts is None else getattr(facts, rule.fact)
    return measured, None if measured is None else bool(rule.passes(facts))


def passes(judgements: Iterable[Judgement]) -> bool:
    """The verdict: no deciding bar is failed."""
    return all(j.passed is not False for j in judgements if j.rule.decides)


def short(value: float) -> str:
    """Two digits: 0.013, 1.3e-6."""
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.2g}").replace("e+", "e")


def or_null(value: Any) -> Any:
    """JSON has neither infinity nor NaN: both are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
