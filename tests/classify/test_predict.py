"""``raymaml predict``: from folders of pictures to rows, and nothing else written."""

from __future__ import annotations

import io
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_predict import (
    CLASSES,
    INDUCTIVE,
    config_file,
    draw,
    draw_classes,
    pattern,
    predict,
    rows_of,
    trained,
)
from numpy.testing import assert_array_equal
from PIL import Image

from raymaml.classify import reading, rows
from raymaml.classify.classifier import FewShotClassifier
from raymaml.config.schema import Config
from raymaml.data.preprocessing import Preprocessing
from raymaml.storage.place import Place

COLUMNS = ["path", "predicted", "probability", "error", "p_ant", "p_bee", "p_cow"]


@pytest.fixture
def run(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return trained(make_config, tmp_path_factory, *INDUCTIVE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with labelled and new pictures; relative paths mean it."""
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path)
    return tmp_path


def usual(config: Config, *more: object) -> list[object]:
    return [config_file(config), "--support", "labelled", "--images", "new", *more]


def expected(config: Config, paths: list[str]) -> Any:
    """Return what the classifier itself says of pictures, [n, 3] float32."""
    support = sorted(Path("labelled").rglob("*.png"))
    classifier = FewShotClassifier.load(config, device="cpu")
    classifier.fit(support, [path.parent.name for path in support])
    return classifier.predict_proba([Path(path) for path in paths]).astype(np.float32)


def test_pictures_of_new_classes(run: Config, here: Path) -> None:
    (here / "new" / "broken.png").write_text("this is text")
    lines = predict(*usual(run, "--out", "found.csv")).output.splitlines()
    steps = f"of {run.outer.num_steps} outer steps"
    assert re.fullmatch(rf"model: {run.name}, checkpoint_\d+ {steps}", lines[0])
    assert lines[1].startswith("leave-one-out accuracy on the support set: ")
    assert lines[1].endswith(", 6 folds)")
    assert lines[2:] == ["9 pictures predicted, of 3 classes, 1 could not be read: found.csv"]
    found = rows_of(here / "found.csv")
    assert list(found[0]) == COLUMNS
    assert [row["path"] for row in found] == sorted(map(str, Path("new").iterdir()))
    (broken,) = (row for row in found if row["error"])
    assert broken == dict.fromkeys(COLUMNS, "") | {
        "path": "new/broken.png",
        "error": "is not a readable image (unknown format)",
    }
    good = [row for row in found if not row["error"]]
    chances = np.array([[row[f"p_{name}"] for name in CLASSES] for row in good], np.float32)
    assert_array_equal(chances, expected(run, [row["path"] for row in good]))
    for row, chance in zip(good, chances, strict=True):
        assert row["predicted"] == CLASSES[chance.argmax()]
        assert np.float32(row["probability"]) == chance.max()
    right = [row["predicted"] == Path(row["path"]).name.split("-")[0] for row in good]
    assert sum(right) >= 6  # of 9; by chance 3
    assert {path.name for path in here.iterdir()} == {"labelled", "new", "found.csv"}


def test_each_picture_is_read_once(
    run: Config, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pixels = list[Any](), Preprocessing.pixels
    monkeypatch.setattr(
        Preprocessing,
        "pixels",
        lambda self, picture: (read.append(picture), pixels(self, picture))[1],
    )
    predict(*usual(run, "--out", "found.csv"))
    assert sorted(map(str, read)) == sorted(map(str, Path().glob("*/**/*.png")))


def test_one_image_a_class_gives_no_estimate(run: Config, here: Path) -> None:
    first, second = (here / f"labelled/bee/{number}.png" for number in (0, 1))
    second.write_bytes(first.read_bytes())
    start = "accuracy: nothing can be estimated, since class bee has one support image"
    for copies, out in ((", the others are copies", "1.csv"), ("", "2.csv")):
        line = predict(*usual(run, "--out", out)).output.splitlines()[1]
        assert line == f"{start}{copies}; give two or more of each class"
        second.unlink(missing_ok=True)


def test_names_may_hold_any_bytes(run: Config, here: Path) -> None:
    (here / "labelled" / "ant").rename(here / "labelled" / os.fsdecode(b'a,"\r\n\xff'))
    (here / "new" / "ant-0.png").rename(here / "new" / os.fsdecode(b"0\r\xfe.png"))
    for out in ("found.csv", "found.parquet"):
        predict(*usual(run, "--out", out))
    found = rows_of(here / "found.csv")
    assert len(found) == 9
    assert found[0]["path"] == "new/0\r\\udcfe.png"
    assert list(found[0])[4:] == ['p_a,"\r\n\\udcff', "p_bee", "p_cow"]
    texts = as_text(pq.read_table("found.parquet")).to_pylist()
    assert [{name: text or "" for name, text in row.items()} for row in texts] == found


def test_parquet_lists_and_a_run_folder_give_the_same_rows(run: Config, here: Path) -> None:
    predict(*usual(run, "--out", "found.csv"))
    table = "path,class\n" + "".join(
        f"{path},{path.parent.name}\n" for path in sorted(Path("labelled").rglob("*.png"))
    )
    (here / "list.csv").write_text(table)
    model = ("--model", run.run_folder, "--support", "list.csv")
    predict(*model, "--images", "new/*.png", "--out", "found.parquet")
    found = pq.read_table(here / "found.parquet")
    assert found.column_names == COLUMNS
    texts = [{k: v or "" for k, v in row.items()} for row in as_text(found).to_pylist()]
    assert texts == rows_of(here / "found.csv")


def as_text(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))


@pytest.mark.parametrize("processes", [1, 2])
def test_how_the_list_is_cut_does_not_change_a_bit(
    run: Config, here: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    predict(*usual(run, "--out", "whole.parquet"))
    monkeypatch.setattr(reading, "_CHUNK", 2)
    if processes > 1:
        monkeypatch.setattr(rows, "_WORTH_PROCESSES", 1)
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    predict(*usual(run, "--out", "cut.parquet"))
    assert pq.read_table("cut.parquet").equals(pq.read_table("whole.parquet"))


def test_a_folder_goes_on_where_it_was_cut_off(
    run: Config, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_CHUNK", 4)
    predict(*usual(run, "--out", "whole.parquet"))
    last = predict(*usual(run, "--out", "shards")).output.splitlines()[-1]
    assert last == "9 pictures predicted, of 3 classes: shards"
    parts = [here / "shards" / f"part-{number:06d}.parquet" for number in range(3)]
    assert sorted(here.glob("shards/*")) == [here / "shards/_predictions.json", *parts]
    parts[1].unlink()  # a kill before it was written
    (here / "shards" / ".part-000001.parquet.partial-0").write_bytes(b"half")
    before = [parts[number].stat().st_mtime_ns for number in (0, 2)]
    assert predict(*usual(run, "--out", "shards")).output.splitlines()[-1] == last
    assert [parts[number].stat().st_mtime_ns for number in (0, 2)] == before
    assert pq.read_table("shards").equals(pq.read_table("whole.parquet"))

    draw(here / "new" / "more.png", 0, 5)
    said = predict(*usual(run, "--out", "shards"), code=2).stderr
    assert said == (
        "raymaml: --out: shards was begun with another list of pictures and another number of"
        " pictures; give another folder, or the same command as before\n"
    )
    (here / "new" / "more.png").unlink()
    draw(here / "labelled" / "ant" / "more.png", 0, 6)
    assert (
        "begun with another support set;" in predict(*usual(run, "--out", "shards"), code=2).stderr
    )
    (here / "labelled" / "ant" / "more.png").unlink()
    other = usual(run, "evaluation.inner.num_steps=1", "--out", "shards")
    assert "begun with another model;" in predict(*other, code=2).stderr
    other = usual(run, "cluster.precision=bf16", "--out", "shards")
    assert "begun with another model;" in predict(*other, code=2).stderr
    assert [parts[number].stat().st_mtime_ns for number in (0, 2)] == before


def test_another_saved_classifier_is_refused(
    run: Config, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was fitted in this process stands for a saved one: it has its classes as well."""

    def load(number: int, _model: object, *, device: str) -> FewShotClassifier:
        images = [f"labelled/{name}/{number}.png" for name in CLASSES]
        return FewShotClassifier(run, device=device).fit(images, CLASSES)

    for number, code in ((0, 0), (0, 0), (1, 2)):
        monkeypatch.setattr(FewShotClassifier, "load", partial(load, number))
        said = predict(config_file(run), "--images", "new", "--out", "shards", code=code)
    assert "--out: shards was begun with another support set;" in said.stderr


def test_a_transductive_model_says_so_and_judges_in_groups(
    make_config: Any, tmp_path_factory: pytest.TempPathFactory, here: Path
) -> None:
    config = trained(make_config, tmp_path_factory, "model.norm=transductive", "model.head=zero")
    (here / "new" / "bee-1.png").write_text("text")
    found = {}
    for group in (2, 3, 50):
        out = f"{group}.parquet"
        lines = predict(*usual(config, "--group", group, "--out", out)).output.splitlines()
        assert lines[-3].endswith(" folds, each judged among the others)")
        assert lines[-2].startswith("warning: model.norm is transductive: ")
        assert f"{group} images" in lines[-2]
        found[group] = np.array([row["p_ant"] for row in pq.read_table(out).to_pylist()], float)
    # 9 pictures, the fifth of them broken: groups of the readable ones, in order
    support = sorted(Path("labelled").rglob("*.png"))
    classifier = FewShotClassifier.load(config, device="cpu", group=2)
    classifier.fit(support, [path.parent.name for path in support])
    paths = [path for path in sorted(Path("new").iterdir()) if path.name != "bee-1.png"]
    pixels = np.stack([classifier.preprocessing.pixels(path) for path in paths])
    readable = ~np.isnan(found[2])
    assert readable.tolist() == [True] * 4 + [False] + [True] * 4
    wanted = classifier.probabilities(pixels)[:, 0].astype(np.float32)
    assert_array_equal(found[2][readable].astype(np.float32), wanted)
    assert not np.array_equal(found[3][readable], found[50][readable])
    lines = predict(*usual(config, "--out", "usual.csv")).output.splitlines()
    assert "6 images" in lines[-2]  # 3 classes of 2 queries, as in its test episodes


def kinds() -> dict[str, bytes]:
    """The picture of a bee, in kinds that Pillow reads; the first is the plainest."""
    image = Image.fromarray(pattern(1, 50))
    values = np.asarray(image)
    other = Image.fromarray(pattern(0, 51))
    grey = list(range(256))
    palette = image.copy()
    palette.putpalette([value for value in grey for _ in range(3)])
    turned, exif = image.rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    clear = Image.merge("LA", (other, Image.new("L", (16, 16), 0)))
    opaque = Image.merge("LA", (image, Image.new("L", (16, 16), 255)))
    animation = {"save_all": True, "append_images": [other], "duration": 100}
    none = Image.new("L", (16, 16), 0)
    ink = Image.merge("CMYK", (none, none, none, image.point(lambda value: 255 - value)))
    return {
        "plain.png": written(image, "PNG"),
        "palette.png": written(palette, "PNG"),
        "deep.png": written(Image.fromarray(values.astype(np.uint16) * 257), "PNG"),
        "ink.tif": written(ink, "TIFF"),
        "opaque.png": written(opaque, "PNG"),
        "turned.png": written(turned, "PNG", exif=exif),
        "moving.gif": written(image, "GIF", **animation),
        "moving.png": written(image, "PNG", **animation),
        "clear.png": written(clear, "PNG"),
        "white.bmp": written(Image.new("L", (16, 16), 255), "BMP"),
    }


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_every_kind_of_picture(run: Config, here: Path) -> None:
    (here / "kinds").mkdir()
    for name, data in kinds().items():
        (here / "kinds" / name).write_bytes(data)
    predict(config_file(run), "--support", "labelled", "-i", "kinds", "--out", "found.csv")
    found = {Path(row["path"]).name: row for row in rows_of(here / "found.csv")}
    assert [row["error"] for row in found.values()] == [""] * 10
    clear = found.pop("clear.png")["p_bee"]
    assert clear == found.pop("white.bmp")["p_bee"]  # nothing is to be seen of it
    assert {row["p_bee"] for row in found.values()} == {found["plain.png"]["p_bee"]} != {clear}


def test_from_and_to_a_bucket(run: Config, here: Path, s3: Place) -> None:
    predict(*usual(run, "--out", "found.parquet"))
    for path in sorted(here.rglob("*.png")):
        (s3 / path.relative_to(here).as_posix()).write_bytes(path.read_bytes())
    support, images = ("--support", s3 / "labelled"), ("--images", s3 / "new")
    for out in (s3 / "found.parquet", s3 / "shards"):
        predict(config_file(run), *support, *images, "--out", out)
    there = pq.read_table(pa.BufferReader((s3 / "found.parquet").read_bytes()))
    part = pq.read_table(pa.BufferReader((s3 / "shards" / "part-000000.parquet").read_bytes()))
    assert part.equals(there)
    assert there["path"][0].as_py() == str(s3 / "new" / "ant-0.png")
    assert there.drop(["path"]).equals(pq.read_table("found.parquet").drop(["path"]))
    assert json.loads((s3 / "shards" / "_predictions.json").read_bytes())["number of pictures"] == 9
