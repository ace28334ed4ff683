"""Draws pictures of coloured shapes, and what can be asked about them, as LLaVA's training files.

    python scripts/draw_shapes.py FOLDER [--pictures 4000] [--held-out 400] [--seed 0]

    FOLDER/images/         PNG pictures, one to four shapes in each
    FOLDER/captions.json   stage 1: a picture and its description
    FOLDER/questions.json  stage 2: a conversation about each picture, a turn per kind of question
    FOLDER/held_out.jsonl  question lines for `unillava predict`, with their answers, about pictures
                           whose arrangement of shapes occurs in no training picture
    FOLDER/corpus.txt      all that is written in them, for `unillava tiny --corpus`

The same arguments give the same files. Within each kind, answers are about equally frequent, so
that knowing them without looking is worth little.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
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
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("colour", "shape", "count", "position")
SIDE = 56
"""Of a picture, in pixels."""
SCALE = 4
"""Drawn larger by this and shrunk, so that edges are smooth."""


@dataclass(frozen=True)
class Thing:
    """One shape of a picture."""

    place: str
    colour: str
    shape: str


Scene = tuple[Thing, ...]
"""What a picture shows, in the order of PLACES."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


# --- scenes ----------------------------------------------------------------------------------


def scene(source: random.Random) -> Scene:
    """One to four things, each in a quarter of its own."""
    places = source.sample(PLACES, source.randint(1, len(PLACES)))
    return tuple(
        Thing(place, source.choice(list(COLOURS)), source.choice(SHAPES))
        for place in sorted(places, key=PLACES.index)
    )


def scenes(trained: int, kept: int, source: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Scenes to learn from, and different ones that are held out: none of them is among the first.

    Every tenth arrangement is held out, so that those of one shape, which are few, are on both
    sides. Scenes to learn from may come again; each is drawn anew.
    """
    learnt: list[Scene] = []
    held: dict[Scene, None] = {}
    side: dict[Scene, bool] = {}
    while len(learnt) < trained or len(held) < kept:
        found = scene(source)
        if side.setdefault(found, source.random() < 0.1):
            held[found] = None
        else:
            learnt.append(found)
    return learnt[:trained], list(held)[:kept]


def draw(scene: Scene, source: random.Random) -> Image.Image:
    """The picture of a scene; sizes, exact places and shades vary."""
    side = SIDE * SCALE
    background = tuple(source.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 2)
        radius = side * source.uniform(0.18, 0.21)
        free = 0.8 * (side / 4 - radius)
        x = side * (0.25 + 0.5 * column) + source.uniform(-free, free)
        y = side * (0.25 + 0.5 * row) + source.uniform(-free, free)
        colour = tuple(min(255, max(0, c + source.randint(-15, 15))) for c in COLOURS[thing.colour])
        draw_shape(pen, thing.shape, x, y, radius, colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: Any
) -> None:
    """One shape in the square of that radius around (x, y)."""
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon(((x, top), (left, bottom), (right, bottom)), fill=colour)


# --- what is said about them -----------------------------------------------------------------


def caption(scene: Scene) -> str:
    """A description of all that the picture shows."""
    parts = [f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in scene]
    return ", ".join(parts) + "."


def possible_turns(scene: Scene) -> dict[str, list[Turn]]:
    """Kind -> the questions about a scene that have one answer."""
    shapes = Counter(thing.shape for thing in scene)
    colours = Counter(thing.colour for thing in scene)
    turns = [Turn("count", "How many shapes are there?", str(len(scene)))]
    for thing in scene:
        place, colour, shape = thing.place, thing.colour, thing.shape
        turns.append(Turn("colour", f"What colour is the shape at the {place}?", colour))
        turns.append(Turn("shape", f"Which shape is at the {place}?", shape))
        if colours[colour] == 1:
            turns.append(Turn("position", f"Where is the {colour} shape?", place))
        if shapes[shape] == 1:
            turns.append(Turn("position", f"Where is the {shape}?", place))
    return {kind: [turn for turn in turns if turn.kind == kind] for kind in KINDS}


class Balance:
    """Chooses turns so that within each kind all answers come about equally often."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.asked: Counter[tuple[str, str]] = Counter()

    def choose(self, turns: Sequence[Turn]) -> Turn:
        """One of the turns with the answer that was given least often so far."""
        turn = min(turns, key=lambda t: (self.asked[t.kind, t.answer], self.source.random()))
        self.asked[turn.kind, turn.answer] += 1
        return turn


# --- files -----------------------------------------------------------------------------------


def captions(pictures: Sequence[tuple[str, Scene]]) -> Iterator[dict[str, Any]]:
    """Records of stage 1."""
    for name, scene in pictures:
        yield record(name, [("human", "<image>\nDescribe the picture."), ("gpt", caption(scene))])


def conversations(
    pictures: Sequence[tuple[str, Scene]], source: random.Random
) -> Iterator[dict[str, Any]]:
    """Records of stage 2: a turn of each kind that the picture allows, in random order."""
    balance = Balance(source)
    for name, scene in pictures:
        turns = [balance.choose(found) for found in possible_turns(scene).values() if found]
        source.shuffle(turns)
        said = [text for turn in turns for text in (("human", turn.question), ("gpt", turn.answer))]
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


def held_out(
    pictures: Sequence[tuple[str, Scene]], source: random.Random
) -> Iterator[dict[str, Any]]:
    """One question line about each picture, the kinds in turn."""
    balance = Balance(source)
    for number, (name, scene) in enumerate(pictures):
        found = possible_turns(scene)
        kinds = (*KINDS[number % len(KINDS) :], *KINDS)
        turn = balance.choose(next(found[kind] for kind in kinds if found[kind]))
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
    lines = [json.dumps(line) + "\n" for line in held_out(named[trained:], source)]
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
