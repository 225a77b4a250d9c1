"""iNaturalist 2017 with few-shot CSVs, on a small folder of this layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from helpers_imports import counts, import_source, plan_source, problems_of
from PIL import Image

from raymaml.data.importers.plan import ImportPlan

KIND = "inaturalist-2017"
plan = partial(plan_source, KIND)
some = partial(plan, verify_counts=False)


def lines(first: int, classes: int, each: int = 1, folder: str = "Aves") -> list[str]:
    return [
        f"{folder}/Species {label}/{label}_{number}.jpg,{label}"
        for label in range(first, first + classes)
        for number in range(each)
    ]


def write(folder: Path, tables: dict[str, list[str]], images: bool = False) -> Path:
    (folder / "fs-splits").mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / "fs-splits" / name).write_text("\n".join(rows) + "\n\n")
        for row in rows if images else ():
            path = folder / "images" / row.split(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (60, 20), "black")
            image.paste("white", (20, 0, 40, 20))
            image.save(path)
    return folder


def labels(found: ImportPlan, split: str) -> set[str]:
    return {planned.name for planned in found.classes if planned.split == split}


def test_csvs_are_told_by_their_number_of_classes(tmp_path: Path) -> None:
    # misleading names; labels of both may start at 0
    write(tmp_path, {"test.csv": lines(0, 908), "train.csv": lines(0, 227, folder="Insecta")})
    found = plan(tmp_path)
    # 0.2 * 908 = 181.6 classes become val
    assert counts(found) == [(726, 726), (182, 182), (227, 227)]
    assert "test-0007 Species 7" in labels(found, "test")
    assert "few-shot splits of test.csv and train.csv; val is 0.2 of" in found.source
    assert found.problems == ()


def test_val_depends_on_fraction_and_seed_alone(tmp_path: Path) -> None:
    write(tmp_path, {"train.csv": lines(0, 20), "test.csv": lines(20, 5)})
    first, again, other = (some(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert labels(first, "val") == labels(again, "val") != labels(other, "val")
    assert len(labels(first, "val")) == 4
    half = some(tmp_path, val_fraction=0.5)
    assert len(labels(half, "val")) == len(labels(half, "train")) == 10
    assert labels(first, "val") < labels(half, "val")  # a draw of fewer is a part of one of more
    assert len(labels(some(tmp_path, val_fraction=0.001), "val")) == 1
    # the order of the lines does not matter
    write(tmp_path, {"train.csv": lines(0, 20)[::-1]})
    assert labels(some(tmp_path), "val") == labels(first, "val")


def test_an_import_makes_a_bank_of_middle_squares(tmp_path: Path) -> None:
    tables = {"train.csv": lines(0, 6, each=3), "test.csv": lines(6, 3, each=3)}
    write(tmp_path / "in", tables, images=True)
    changes = {"val_fraction": 0.4, "verify_counts": False}
    bank = import_source(KIND, tmp_path / "in", tmp_path, 10, images=3, **changes)
    # 0.4 * 6 = 2.4 classes
    assert [len(bank.class_ids(split)) for split in ("train", "val", "test")] == [4, 2, 3]
    assert bank.class_images(0).shape == (3, 10, 10, 3)
    assert bank.class_images(0).min() > 230


def test_wrong_counts_and_shared_images_are_one_message(tmp_path: Path) -> None:
    write(tmp_path, {"train.csv": lines(0, 9), "test.csv": [*lines(9, 2), *lines(0, 1)]})
    problems = problems_of(plan, tmp_path)
    assert len(problems) == 3
    assert "train.csv: split train has 9 classes, meta-iNat has 908" in problems[0]
    assert "test.csv: split test has 3 classes, meta-iNat has 227" in problems[1]
    shared = "Aves/Species 0/0_0.jpg is in test.csv too, the other split; keep it in one of them"
    assert problems[2] == f"{tmp_path / 'fs-splits' / 'train.csv'}: {shared}"


def test_broken_lines_are_named(tmp_path: Path) -> None:
    bad = ["a.jpg,1", "b.jpg", "c.jpg,x", "../d.jpg,1", "/e.jpg,1", "a.jpg,2"]
    write(tmp_path, {"train.csv": bad, "test.csv": lines(0, 2)})
    table = tmp_path / "fs-splits" / "train.csv"
    numbers = [problem.split(": ")[0] for problem in problems_of(plan, tmp_path)]
    assert numbers == [f"{table}:{number}" for number in (2, 3, 4, 5, 6)]


def test_a_missing_csv_is_named(tmp_path: Path) -> None:
    assert "holds no fs-splits/train.csv and fs-splits/test.csv" in problems_of(plan, tmp_path)[0]
    write(tmp_path, {"train.csv": lines(0, 9), "other.csv": lines(9, 3)})
    problems = problems_of(some, tmp_path)
    assert "no file of split test of meta-iNat (227 classes)" in problems[0]
    assert "train.csv (9 classes, 9 images)" in problems[0]
    assert problems[0].endswith("where the numbers of classes differ, call the file test")
