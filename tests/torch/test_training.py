"""The torch engine against a plain loop of transformers and torch.optim; what it must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from backends.contract import AdamW, Group
from backends.torch import training
from backends.torch.reference import canonical
from tests.training_cases import CASES
from unillava.config import read_spec
from unillava.data.collate import IMAGE, Sample, collate
from unillava.models.llava import LlavaForTraining
from unillava.rope import rotary_tables

V, IMAGE_TOKEN, ROWS = 99, 97, 16

CONFIG = transformers.LlavaConfig(
    vision_config={
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 56,
        "image_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 6,
        "projection_dim": 16,
    },
    text_config={
        "model_type": "llama", "vocab_size": V, "hidden_size": 32, "intermediate_size": 72,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    },
    image_token_index=IMAGE_TOKEN,
)  # fmt: skip
DECAYED = AdamW(beta2=0.95, eps=1e-6, clip_norm=1.0)


def sample(rng: np.random.Generator) -> Sample:
    """Some text, a picture, some text of which most is learnt."""
    before, after = rng.integers(2, 6), rng.integers(5, 12)
    kind = np.array([0] * before + [IMAGE] * ROWS + [0] * after, np.int8)
    row = np.where(kind == IMAGE, np.arange(len(kind)) - before, 0)
    # Few different tokens, so that there is something to learn.
    ids = np.where(kind == 0, rng.integers(1, 9, len(kind)), 0)
    learnt = np.arange(len(kind)) >= before + ROWS + 2
    pixels = rng.standard_normal((1, 3, 24, 24)).astype(np.float32)
    return Sample(ids, kind, row, learnt, pixels, None, ROWS)


def for_transformers(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The batch as transformers' processors and collators give it."""
    S = max(map(len, samples))

    def padded(rows: list[np.ndarray], value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (S - len(row))] for row in rows])

    ids = [np.where(s.kind_S == IMAGE, IMAGE_TOKEN, s.ids_S) for s in samples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([np.ones(len(s), np.int64) for s in samples], 0),
        "labels": padded([np.where(s.learnt_S, s.ids_S, -100) for s in samples], -100),
        "pixel_values": torch.from_numpy(np.concatenate([s.pixels_T3HW for s in samples])),
    }


def for_engine(spec, samples: list[Sample]) -> list[np.ndarray | None]:
    batch = collate(samples)
    names = ("input_ids", "merge_index", "position_ids", "segment_ids")
    tables = rotary_tables(spec.text, batch["input_ids"].shape[1])
    return [
        *(batch[name] for name in names), *(table.astype(np.float64) for table in tables),
        batch["target_index"], batch["targets"], batch["pixel_values"], None,
    ]  # fmt: skip


def groups_of(names: list[str]) -> tuple[Group, ...]:
    plain = [name for name in names if name.endswith("bias") or "norm" in name]
    return (
        Group("decayed", tuple(name for name in names if name not in plain), 0.1),
        Group("plain", tuple(plain)),
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads only wait for one another with modules as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference():
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(CONFIG)
    model.model.vision_tower.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data.mul_(4)  # transformers' initialisation hardly moves anything
    return model


def test_fifty_steps_of_a_plain_loop(reference, runtime):
    """Loss and norm of every step equal those of transformers and torch.optim.AdamW."""
    spec = read_spec(CONFIG.to_dict())
    values = {
        canonical(name): p.detach().numpy().copy() for name, p in reference.named_parameters()
    }
    trained = {canonical(n): p for n, p in reference.named_parameters() if p.requires_grad}
    groups = groups_of(list(trained))
    module = runtime.build(lambda: LlavaForTraining(spec))
    runtime.set_trained(module, trained)
    for name, value in values.items():
        runtime.assign(module, name, value)
    engine = training.Engine(module, groups, DECAYED)
    optimizer = torch.optim.AdamW(
        [
            {"params": [trained[n] for n in group.parameters], "weight_decay": group.weight_decay}
            for group in groups
        ],
        betas=(DECAYED.beta1, DECAYED.beta2),
        eps=DECAYED.eps,
    )
    rng, losses = np.random.default_rng(0), []
    for step in range(50):
        rate = 2e-3 * (1 - step / 50)
        samples = [sample(rng) for _ in range(3)]
        loss = reference(**for_transformers(samples)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), DECAYED.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        inputs = for_engine(spec, samples)
        found = engine.accumulate(inputs, 1 / len(inputs[7]))
        norms = engine.update({"decayed": rate, "plain": rate})
        assert found == pytest.approx(loss.item(), rel=1e-5), step
        assert norms.total == pytest.approx(norm.item(), rel=1e-4), step
        losses.append(found)
    assert losses[-1] < losses[0] - 1, "nothing was learnt: the comparison says little"


def test_no_graph_through_a_frozen_tower(runtime):
    """Nor a gradient or moment of what is not trained, nor one left after an update."""
    case = CASES["llava"]()
    module = case.build(runtime, case.trained)
    engine = training.Engine(module, case.groups, AdamW())
    seen = []
    module.vision_tower.register_forward_hook(lambda layer, args, out: seen.append(out))
    module.multi_modal_projector.register_forward_hook(lambda layer, args, out: seen.append(out))
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    tower, projector = seen
    assert tower.grad_fn is None and not tower.requires_grad
    assert projector.grad_fn is not None
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name in case.trained)
        assert (parameter.grad is not None) == (name in case.trained), name
    engine.update(case.rates)
    assert all(parameter.grad is None for parameter in module.parameters())
    held = {id(p) for group in engine._strategy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize("frozen", ["language_model", "multi_modal_projector"])
def test_head_computes_no_gradient_that_nobody_wants(frozen, runtime):
    """A frozen head costs no [V, D] gradient; a frozen projector still lets the newline learn."""
    case = CASES["llava"]()
    trained = [name for name in case.trained if not name.startswith(frozen)]
    module = case.build(runtime, trained)
    engine = training.Engine(module, [Group("all", tuple(trained))], AdamW())
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    assert engine.update({"all": 1e-3}).total > 0
    for name, value in case.values.items():
        if name not in trained:
            np.testing.assert_array_equal(runtime.fetch(module, name), value)


def test_recomputed_and_compiled_together(runtime):
    """A compiled layer that is recomputed stays recomputed, and gives the same."""
    results = []
    for compiled in (False, True):
        case = CASES["small"]()
        module = case.build(runtime, case.trained)
        for part in module.parts:
            runtime.recompute(part)
        engine = training.Engine(module, case.groups, AdamW(), compiled=compiled)
        for inputs in case.batches(0, 2):
            loss = engine.accumulate(inputs, 0.5)
        results.append((loss, engine.update(case.rates).total))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
