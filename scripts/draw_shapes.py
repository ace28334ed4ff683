"""Draws pictures of coloured shapes, and what can be asked about them, as LLaVA's training files.

    python scripts/draw_shapes.py FOLDER [--pictures 4000] [--held-out 400] [--seed 0]

    FOLDER/images/         PNG pictures: one to four shapes of a kind, close together
    FOLDER/captions.json   stage 1: a picture and its description
    FOLDER/questions.json  stage 2: a conversation about each picture, a turn per kind of question
    FOLDER/held_out.jsonl  question lines for `unillava predict`, with their answers, about pictures
                           whose combination of properties occurs in no training picture
    FOLDER/corpus.txt      all that is written in them, for `unillava tiny --corpus`

The same arguments give the same files. Within each kind, answers are about equally frequent, so
that knowing them without looking is worth little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "yellow": (245, 200, 30),
}
SHAPES = ("square", "ring", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = (1, 2, 3, 4)
SIDE = 112
"""Of a picture, in pixels."""
GREY = (122, 117, 104)
"""Of the background: what CLIP's processor subtracts, so that a patch without a shape is little
more than its place. On white the same is learnt, but in more steps."""
SCALE = 3
"""Drawn larger by this and shrunk, so that edges are smooth."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    count: int
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


# --- scenes ----------------------------------------------------------------------------------


def scenes(trained: int, kept: int, source: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Scenes to learn from and to hold out: no combination is on both sides.

    Every eighth combination is held out. Scenes come again and again; each is drawn anew.
    """
    every = [Scene(*parts) for parts in itertools.product(COUNTS, COLOURS, SHAPES, PLACES)]
    source.shuffle(every)
    held, learnt = every[: len(every) // 8], every[len(every) // 8 :]
    return source.choices(learnt, k=trained), source.choices(held, k=kept)


def draw(scene: Scene, source: random.Random) -> Image.Image:
    """The picture of a scene; sizes, exact places and shades vary."""
    side = SIDE * SCALE
    background = tuple(c + source.randint(-8, 8) for c in GREY)
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    row, column = divmod(PLACES.index(scene.place), 2)
    colour = tuple(min(255, max(0, c + source.randint(-15, 15))) for c in COLOURS[scene.colour])
    cell = side / 4
    for corner in source.sample(range(4), scene.count):
        down, right = divmod(corner, 2)
        radius = cell * source.uniform(0.38, 0.42)
        free = 0.4 * (cell / 2 - radius)
        x = cell * (2 * column + right + 0.5) + source.uniform(-free, free)
        y = cell * (2 * row + down + 0.5) + source.uniform(-free, free)
        draw_shape(pen, scene.shape, x, y, radius, colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: Any
) -> None:
    """One shape in the square of that radius around (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    width = 0.6 * radius
    if shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(width))
    else:
        pen.rectangle((x - radius, y - width / 2, x + radius, y + width / 2), fill=colour)
        pen.rectangle((x - width / 2, y - radius, x + width / 2, y + radius), fill=colour)


# --- what is said about them -----------------------------------------------------------------


def caption(scene: Scene) -> str:
    """A description of all that the picture shows."""
    plural = {"cross": "crosses"}.get(scene.shape, f"{scene.shape}s")
    shown = scene.shape if scene.count == 1 else plural
    return f"{scene.count} {scene.colour} {shown} at the {scene.place}."


def turns(scene: Scene) -> list[Turn]:
    """All questions about a scene."""
    return [
        Turn("colour", "What colour are the shapes?", scene.colour),
        Turn("shape", "Which shape is it?", scene.shape),
        Turn("count", "How many shapes are there?", str(scene.count)),
        Turn("position", "Where are the shapes?", scene.place),
    ]


# --- files -----------------------------------------------------------------------------------


def captions(pictures: Sequence[tuple[str, Scene]]) -> Iterator[dict[str, Any]]:
    """Records of stage 1."""
    for name, scene in pictures:
        yield record(name, [("human", "<image>\nDescribe the picture."), ("gpt", caption(scene))])


def conversations(
    pictures: Sequence[tuple[str, Scene]], source: random.Random
) -> Iterator[dict[str, Any]]:
    """Records of stage 2: all questions about a picture, in random order."""
    for name, scene in pictures:
        asked = turns(scene)
        source.shuffle(asked)
        said = [text for turn in asked for text in (("human", turn.question), ("gpt", turn.answer))]
        said[0] = ("human", "<image>\n" + said[0][1])
        yield record(name, said)


def record(name: str, said: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A LLaVA record about one picture."""
    turns = [{"from": who, "value": text} for who, text in said]
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def spoken(conversation: dict[str, Any]) -> Iterator[str]:
    """The words of a record as a model reads them."""
    for turn in conversation["conversations"]:
        yield {"human": "USER:", "gpt": "ASSISTANT:"}[turn["from"]]
        yield turn["value"].removeprefix("<image>\n")


def held_out(pictures: Sequence[tuple[str, Scene]]) -> Iterator[dict[str, Any]]:
    """One question line about each picture, the kinds in turn."""
    for number, (name, scene) in enumerate(pictures):
        asked = turns(scene)
        turn = asked[number % len(asked)]
        yield {
            "question_id": number,
            "image": name,
            "text": turn.question,
            "category": turn.kind,
            "answer": turn.answer,
        }


def write(folder: Path, trained: int, kept: int, seed: int) -> None:
    """Draw all pictures and write all files into `folder`."""
    source = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    learnt, held = scenes(trained, kept, source)
    named = [(f"images/{n:05}.png", shown) for n, shown in enumerate([*learnt, *held])]
    for name, shown in named:
        draw(shown, source).save(folder / name)
    records = {
        "captions.json": list(captions(named[:trained])),
        "questions.json": list(conversations(named[:trained], source)),
    }
    for name, content in records.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(line) + "\n" for line in held_out(named[trained:])]
    (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [" ".join(spoken(r)) for part in records.values() for r in part]
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{folder}: {trained} pictures to learn from, {kept} held out")


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=4000, help="to learn from")
    parser.add_argument("--held-out", type=int, default=400, help="kept for the questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.pictures, options.held_out, options.seed)


if __name__ == "__main__":
    main()
