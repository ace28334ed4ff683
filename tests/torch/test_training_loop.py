"""A recipe against a loop that somebody wrote by hand with transformers and torch.optim.

The model, the processor with its prompt, the loss, AdamW, clipping and the schedule are
transformers' and torch's; only which samples an update takes is asked of the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from unillava.training import state
from unillava.training.recipe import Recipe, read_recipe
from unillava.training.run import make_plan
from unillava.training.session import run_recipe
from weight_convert.dialects import hf

STEPS = {"llava": 10, "llava_next": 50}
RATE, PROJECTOR_RATE, DECAY, CLIP, WARMUP = 1e-3, 3e-4, 0.1, 0.7, 5


@pytest.fixture(scope="module", params=STEPS)
def recipe(request, tiny, photo, tmp_path_factory) -> Recipe:
    steps = STEPS[request.param]
    folder = tmp_path_factory.mktemp("loop")
    data = folder / "data.json"
    data.write_text(json.dumps(list(records(photo, folder))))
    content = {
        "model": {"path": str(tiny(request.param))},
        "data": {"files": [{"path": str(data)}], "workers": 0, "pad_to": 32},
        "rates": {"language": RATE, "projector": PROJECTOR_RATE},
        "steps": {"batch": 4, "micro_batch": 2, "max_steps": steps},
        "optimizer": {"weight_decay": DECAY, "clip_norm": CLIP, "warmup_steps": WARMUP},
        "running": {"precision": "float32"},
        "saving": {"every": steps},
        "output": str(folder / "out"),
    }
    return read_recipe(content)


def records(photo: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """One and two turns, pictures of several shapes, two pictures, none."""
    with Image.open(photo) as image:
        for n, size in enumerate([(64, 64), (120, 40), (30, 90), (75, 50)]):
            image.convert("RGB").resize(size).save(folder / f"{n}.png")
    for n in range(18):
        pictures = [f"{n % 4}.png"][: n % 3 > 0] + ["1.png"][: n % 6 == 5]
        turns = [("human", "<image>\n" * len(pictures) + f"What is {n}?"), ("gpt", f"It is {n}.")]
        turns += [("human", "Are you sure?"), ("gpt", "Yes, as far as I see.")] * (n % 2)
        record = {"id": n, "conversations": [{"from": who, "value": text} for who, text in turns]}
        yield record | ({"image": pictures} if pictures else {})


class Peer:
    """The hand-written loop."""

    def __init__(self, recipe: Recipe) -> None:
        directory = recipe.model.path
        auto = transformers.AutoModelForImageTextToText
        self.model = auto.from_pretrained(directory, dtype=torch.float32)
        self.processor = transformers.AutoProcessor.from_pretrained(directory)
        self.model.model.vision_tower.requires_grad_(False)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = {}
        for name, parameter in trained:
            projector = "language_model" not in name and "lm_head" not in name
            settings = (projector, parameter.ndim > 1)
            groups.setdefault(settings, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": PROJECTOR_RATE if projector else RATE,
                    "weight_decay": DECAY if decayed else 0.0,
                }
                for (projector, decayed), parameters in groups.items()
            ],
            eps=1e-8,
        )
        self.schedule = transformers.get_cosine_schedule_with_warmup(
            self.optimizer, WARMUP, recipe.steps.max_steps
        )

    def prompt(self, messages: list[dict], generate: bool) -> str:
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=generate, tokenize=False
        )
        bos = self.processor.tokenizer.bos_token or ""
        return text[len(bos) :] if bos and text.startswith(bos) else text

    def sample(self, record: dict, folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs and labels: what follows each prompt up to the end of the answer."""
        pictures = [Image.open(folder / name) for name in record.get("image", [])]
        messages = []
        for turn in record["conversations"]:
            text = turn["value"].replace("<image>\n", "")
            content = [{"type": "text", "text": text}]
            if "<image>" in turn["value"]:
                content = [{"type": "image"}] * len(pictures) + content
            role = {"human": "user", "gpt": "assistant"}[turn["from"]]
            messages.append({"role": role, "content": content})

        def encoded(upto: int, generate: bool) -> Any:
            text = self.prompt(messages[:upto], generate)
            return self.processor(text=text, images=pictures or None, return_tensors="pt")

        whole = encoded(len(messages), False)
        ids = whole["input_ids"]
        labels = torch.full_like(ids, -100)
        for n in range(1, len(messages), 2):
            begin = encoded(n, True)["input_ids"].shape[1]
            end = encoded(n + 1, False)["input_ids"].shape[1]
            labels[:, begin:end] = ids[:, begin:end]
        return whole, labels

    def update(self, samples: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> float:
        learnt = sum(int((labels[:, 1:] != -100).sum()) for _, labels in samples)
        total = 0.0
        for inputs, labels in samples:
            logits = self.model(**inputs).logits[:, :-1].flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (losses / learnt).backward()
            total += losses.item() / learnt
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total


def test_the_loss_is_that_of_a_plain_loop(recipe):
    plan, steps = make_plan(recipe), recipe.steps.max_steps
    folder = Path(recipe.data.files[0].path).parent
    content = json.loads((folder / "data.json").read_text())
    assert run_recipe(recipe, backend="torch", device="cpu")
    log = (folder / "out" / "log.jsonl").read_text().splitlines()
    ours = np.array([json.loads(line)["loss"] for line in log])

    peer = Peer(recipe)
    prepared = [peer.sample(record, folder) for record in content]
    batch = recipe.steps.batch
    rows = [plan.order.rows(n * batch, (n + 1) * batch) for n in range(steps)]
    theirs = np.array([peer.update([prepared[int(i)] for (i,) in row]) for row in rows])
    assert len(ours) == steps and theirs[-1] < theirs[0] / 2, "it learns"
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)

    saved = state.find_latest(folder / "out")
    values = dict(peer.model.named_parameters())
    for name in plan.trained_shapes:
        reference = values[hf.spelled_name(name, hf.MEMORY_OF_5)].detach().numpy()
        off = np.abs(saved.read(name, "parameter") - reference).max()
        assert off <= 0.01 * steps * RATE, name
