"""The glyphs source: which characters are classes, how they are drawn, how they are split."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from raymaml.config.data_sources import GlyphsSource
from raymaml.data.importers.glyphs import (
    frame,
    plan_glyphs,
    split_of,
    without_doubles,
)
from raymaml.data.importers.plan import ImportPlan, PlannedClass

SOURCE = GlyphsSource(kind="glyphs")


@pytest.fixture(scope="module")
def plan() -> ImportPlan:
    return plan_glyphs(SOURCE, 28)


def character(planned: PlannedClass) -> str:
    return chr(int(planned.name.split("(U+")[1].rstrip(")"), 16))


def find(plan: ImportPlan, char: str) -> PlannedClass | None:
    return next((planned for planned in plan.classes if character(planned) == char), None)


def test_splits_are_of_useful_size(plan: ImportPlan) -> None:
    splits = [planned.split for planned in plan.classes]
    assert "DejaVu" in plan.source
    assert '"min_fonts":12' in plan.source
    assert f"{splits.count('train')} train (Latin" in plan.source
    shares = [splits.count(split) / len(splits) for split in ("train", "val", "test")]
    assert len(splits) > 1400
    np.testing.assert_allclose(shares, [0.64, 0.16, 0.20], atol=0.05)
    assert splits == sorted(splits, key=("train", "val", "test").index)


def test_splits_share_no_script(plan: ImportPlan) -> None:
    words = {
        split: {
            unicodedata.name(character(planned)).split()[0]
            for planned in plan.classes
            if planned.split == split and unicodedata.category(character(planned)) in ("Lu", "Ll")
        }
        for split in ("train", "val", "test")
    }
    assert "LATIN" in words["train"]
    assert words["val"] == {"GREEK"}
    assert words["test"] == {"ARMENIAN", "CYRILLIC", "GEORGIAN"}


@pytest.mark.parametrize(
    ("char", "split"),
    [
        ("A", "train"),
        ("\u03b1", "val"),
        ("\u0416", "test"),
        ("\u1d78", "test"),  # MODIFIER LETTER CYRILLIC EN
        ("\u0660", "test"),  # ARABIC-INDIC DIGIT ZERO
        ("\u2192", "train"),  # RIGHTWARDS ARROW
        ("7", "train"),
    ],
)
def test_the_split_is_told_by_the_script_in_the_name(char: str, split: str) -> None:
    assert split_of(char) == split


def test_look_alikes_of_other_scripts_marks_and_spaces_are_no_classes(plan: ImportPlan) -> None:
    # Greek Alpha, Cyrillic A and Er, Armenian Oh, Ohm, Kelvin, Cyrillic Io (looks like E diaeresis)
    doubles = "\u0391\u0410\u0420\u0585\u2126\u212a\u0401"
    assert [find(plan, char) for char in doubles] == [None] * len(doubles)
    assert all(find(plan, char) for char in "APoKO0\u03a9\u0416\u00cb")
    assert {unicodedata.category(character(p))[0] for p in plan.classes}.isdisjoint("MZC")
    assert find(plan, "a").name == "LATIN SMALL LETTER A (U+0061)"  # type: ignore[union-attr]
    assert len({planned.name for planned in plan.classes}) == len(plan.classes)


def test_images_are_white_strokes_on_black_and_all_different(plan: ImportPlan) -> None:
    for planned in plan.classes[::60]:
        images = planned.load()
        assert images.shape == (planned.count, 28, 28, 1) == (20, 28, 28, 1)
        assert images.dtype == np.uint8
        assert (images.max((1, 2, 3)) > 128).all(), f"an empty image of {planned.name}"
        assert (images.mean((1, 2, 3)) < 128).all()
        assert len({image.tobytes() for image in images}) == 20


def test_ink_is_in_the_middle_and_keeps_its_size(plan: ImportPlan) -> None:
    """Up to the distortion: 6% of 28 pixels are 1.7, half a pixel is rounding."""
    large, small, dot = (find(plan, char).load()[..., 0].astype(float) for char in "Oo.")  # type: ignore[union-attr]
    rows = dot.sum(2) @ np.arange(28) / dot.sum((1, 2))
    columns = dot.sum(1) @ np.arange(28) / dot.sum((1, 2))
    assert np.abs(np.stack([rows, columns]) - 13.5).max() < 1.7 + 0.5
    assert large.mean() > 1.2 * small.mean()


def test_images_are_a_function_of_seed_and_character() -> None:
    few = SOURCE.model_copy(update={"min_fonts": 16})
    plan = plan_glyphs(few, 28)
    again = plan_glyphs(few.model_copy(update={"images_per_class": 30}), 28)
    other = plan_glyphs(few.model_copy(update={"seed": 1}), 28)
    first, more, different = (find(p, "\u0416").load() for p in (plan, again, other))  # type: ignore[union-attr]
    np.testing.assert_array_equal(more[:20], first)
    assert not (different == first).all((1, 2, 3)).any()


def test_without_distortion_every_font_comes_before_any_comes_again() -> None:
    source = SOURCE.model_copy(update={"distortion": 0.0, "min_fonts": 16, "images_per_class": 32})
    planned = find(plan_glyphs(source, 28), "g")
    assert planned is not None
    images = [image.tobytes() for image in planned.load()]
    assert len(set(images[:16])) == 16
    assert images[:16] == images[16:]


def drawing(left: int, top: int, right: int, bottom: int) -> NDArray[np.uint8]:
    ink = Image.new("L", (20, 20))
    ink.paste(255, (left, top, right, bottom))
    return frame(ink)


def test_a_double_looks_like_one_earlier_character_in_half_of_its_fonts() -> None:
    bar, block, rule = drawing(0, 0, 2, 20), drawing(0, 0, 20, 20), drawing(0, 0, 20, 2)
    drawings = {
        "a": {"f1": bar, "f2": bar},
        "b": {"f1": bar, "f2": block},  # like a in one of two fonts: a double
        "c": {"f1": bar, "f2": block, "f3": rule},  # like a in one of three fonts
        "d": {"f1": block, "f2": rule},
    }
    assert without_doubles(drawings) == ["a", "c", "d"]
