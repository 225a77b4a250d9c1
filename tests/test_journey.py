"""A person's own pictures, from the starter config to the classes of new ones."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from raymaml.cli import main

COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")
OUTLINES = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "bar": ((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "arrow": ((-1, 0), (0, -1), (0, -0.4), (1, -0.4), (1, 0.4), (0, 0.4), (0, 1)),
    "kite": ((0, -1), (0.6, -0.2), (0, 1), (-0.6, -0.2)),
}
NEW = {
    "orange hourglass": ((-1, -1), (1, -1), (-1, 1), (1, 1)),
    "white star": ((0, -1), (0.3, -0.3), (1, 0), (0.3, 0.3), (0, 1), (-0.3, 0.3), (-1, 0)),
    "green stairs": ((-1, 1), (-1, 0.3), (-0.3, 0.3), (-0.3, -0.3), (1, -0.3), (1, 1)),
}
SMALL = (
    *("data.image_size=28", "model.width=16", "inner.num_steps=2", "evaluation.inner.num_steps=4"),
    *("episodes.train.num_episodes=240", "episodes.val.num_episodes=20"),
    *("episodes.test.num_episodes=20", "outer.num_steps=60", "outer.validate_every=30"),
)


def draw(path: Path, outline: tuple[tuple[float, float], ...], colour: str) -> None:
    """Draw a shape at a random place and size on noise."""
    generator = np.random.default_rng(list(str(path).encode()))
    image = Image.fromarray(generator.integers(0, 160, (40, 48, 3), dtype=np.uint8))
    size, x, y = generator.uniform(9, 13), generator.uniform(16, 32), generator.uniform(15, 25)
    corners = [(x + size * right, y + size * down) for right, down in outline]
    ImageDraw.Draw(image).polygon(corners, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def raymaml(*words: object) -> str:
    outcome = CliRunner().invoke(main, list(map(str, words)))
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_own_pictures_to_new_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of seconds; the command never sees the labels that its answers are held to."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        for shape, outline in OUTLINES.items():
            for number in range(8):
                path = Path(f"my_images/{colour} {shape}/{number}.png")
                draw(path, outline, colour)
    for way, (name, outline) in enumerate(NEW.items()):
        for number in range(12):
            folder = f"labelled/{name}" if number < 3 else "new"
            file = f"{number if number < 3 else 100 + 7 * number + way}.jpg"
            draw(Path(folder, file), outline, name.split()[0])
    raymaml("init", "images")
    for command in (["data", "import"], ["data", "sample"]):
        raymaml(*command, "images.yaml", *SMALL)
    raymaml("train", "images.yaml", *SMALL, "--local")
    where = ("--support", "labelled", "--images", "new", "--out", "found.csv")
    said = raymaml("predict", "images.yaml", *SMALL, *where)
    assert "27 pictures predicted, of 3 classes: found.csv" in said
    with Path("found.csv").open(encoding="utf-8", newline="") as file:
        found = {int(Path(row["path"]).stem): row["predicted"] for row in csv.DictReader(file)}
    names = list(NEW)
    right = [
        found[100 + 7 * number + way] == names[way] for number in range(3, 12) for way in (0, 1, 2)
    ]
    assert sum(right) >= 20, said  # of 27; by chance 9
