"""Contract 9 for ``raymaml predict``: one message for each mistake, and nothing written."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_predict import INDUCTIVE, config_file, draw, draw_classes, predict, trained
from PIL import Image

USUAL = "{config} --support labelled --images new --out found.csv"
Mess = Callable[[Path], object]


def write(name: str, text: str) -> Mess:
    return lambda here: (here / name).write_text(text)


def remove(name: str) -> Mess:
    return lambda here: shutil.rmtree(here / name)


def make(name: str) -> Mess:
    return lambda here: (here / name).mkdir(parents=True)


def copy(name: str, to: str) -> Mess:
    return lambda here: shutil.copy(here / name, here / to)


def huge(name: str) -> Mess:
    return lambda here: Image.new("1", (10_000, 9_000)).save(here / name)


def nothing(_here: Path) -> None:
    pass


MISTAKES: dict[str, tuple[str, Mess, str]] = {
    # the support set
    "no --support": (
        "{config} --images new --out found.csv",
        nothing,
        "--support is missing: the model of a run has no classes of its own; give the folder",
    ),
    "no such support": (
        "{config} --support nowhere --images new --out found.csv",
        nothing,
        "--support: nowhere is no folder; give a folder that holds a folder a class, or a CSV",
    ),
    "a picture as support": (
        "{config} --support new/ant-0.png --images new --out found.csv",
        nothing,
        "--support: new/ant-0.png is no folder; give a folder that holds a folder a class",
    ),
    "no class folders": (
        "{config} --support new --images new --out found.csv",
        nothing,
        "--support: new holds no class folders; give a folder with the pictures of each class",
    ),
    "one class": (
        USUAL,
        lambda here: [shutil.rmtree(here / "labelled" / name) for name in ("bee", "cow")],
        "--support: labelled holds one class, ant; give a folder with the pictures of each class",
    ),
    "a class without pictures": (
        USUAL,
        make("labelled/dog"),
        "--support: class dog has no pictures that Pillow reads; add some, or remove the folder",
    ),
    "ways of a learned head": (
        "{learned} --support labelled --images new --out found.csv",
        lambda here: draw(here / "labelled/dog/1.png", 3, 1),
        "4 classes, and the model has a learned head for 3; give images of 3 classes, or train",
    ),
    "text as a support image": (
        USUAL,
        write("labelled/ant/0.png", "this is text"),
        "labelled/ant/0.png: is not a readable image (unknown format); mend or remove it",
    ),
    "a support image cut off": (
        USUAL,
        lambda here: (here / "labelled/ant/0.png").write_bytes(
            (here / "labelled/ant/1.png").read_bytes()[:150]
        ),
        "labelled/ant/0.png: is not a readable image (",
    ),
    "a support image too large": (
        USUAL,
        huge("labelled/ant/0.png"),
        "labelled/ant/0.png: is not a readable image (Image size (90000000 pixels) exceeds",
    ),
    "a support image among the pictures": (
        USUAL,
        copy("labelled/bee/1.png", "new/cow-9.png"),
        "new/cow-9.png: is a support image of class bee (labelled/bee/1.png); its class is given:",
    ),
    "the support set as pictures": (
        "{config} --support labelled --images labelled/ant --out found.csv",
        nothing,
        "labelled/ant/0.png: is a support image of class ant (labelled/ant/0.png); ... "
        "labelled/ant/1.png: is a support image",
    ),
    "one picture in two classes": (
        USUAL,
        copy("labelled/bee/1.png", "labelled/cow/9.png"),
        "labelled/cow/9.png: is in the classes bee (labelled/bee/1.png) and cow; leave it in one",
    ),
    # lists
    "no column class": (
        "{config} --support list.csv --images new --out found.csv",
        write("list.csv", "path,label\nx.png,a\n"),
        "list.csv:1: lacks the column class; the header is 'path,label'; it must name path and",
    ),
    "no column path": (
        "{config} --support labelled --images list.csv --out found.csv",
        write("list.csv", "new/ant-0.png\n"),
        "list.csv:1: lacks the column path; the header is 'new/ant-0.png'; it must name path",
    ),
    "a path that is missing": (
        "{config} --support list.csv --images list.csv --out found.csv",
        write("list.csv", "path,class\nnew/x.png,a\nnew/ant-0.png,a\nnew/ant-1.png\n"),
        "list.csv:2: new/x.png does not exist; mend the path ... list.csv:4: lacks path or class",
    ),
    "an empty list": (
        "{config} --support labelled --images list.csv --out found.csv",
        write("list.csv", "path\n"),
        "list.csv: lists no pictures; add some",
    ),
    "no such list": (
        "{config} --support labelled --images nowhere.csv --out found.csv",
        nothing,
        "--images: nowhere.csv cannot be read ([Errno 2] No such file or directory",
    ),
    "a list of one class": (
        "{config} --support list.csv --images new/bee-0.png --out found.csv",
        write("list.csv", "path,class\nnew/ant-0.png,a\n"),
        "--support: list.csv holds one class, a; give",
    ),
    # the pictures
    "no such pictures": (
        "{config} --support labelled --images nowhere --out found.csv",
        nothing,
        "--images: nowhere does not exist; give a folder, a picture, a CSV (path), or a pattern",
    ),
    "a pattern that matches nothing": (
        "{config} --support labelled --images 'new/*.jpg' --out found.csv",
        nothing,
        "--images: new/*.jpg matches no file; give another place",
    ),
    "a folder without pictures": (
        "{config} --support labelled --images empty --out found.csv",
        make("empty"),
        "--images: empty has no pictures that Pillow reads; give another place",
    ),
    "a pattern without quotes": (
        "{config} --support labelled --out found.csv --images new/ant-0.png new/ant-1.png",
        nothing,
        "new/ant-1.png stands where an override should; put a pattern in quotes:",
    ),
    "an unknown kind of URI": (
        "{config} --support labelled --images nosuch://bucket/new --out found.csv",
        nothing,
        "--images: nosuch://bucket/new: it should be a path, or a URI that fsspec knows (",
    ),
    # the output
    "an output that exists": (
        USUAL,
        write("found.csv", "mine"),
        "--out: found.csv exists; move it away, or give another name",
    ),
    "an unknown suffix": (
        "{config} --support labelled --images new --out found.xlsx",
        nothing,
        "--out: found.xlsx ends in .xlsx; give a name that ends in .csv or .parquet",
    ),
    "an output in a folder that is missing": (
        "{config} --support labelled --images new --out results/found.csv",
        nothing,
        "--out: results is no folder; make it, or give another",
    ),
    "a folder of something else": (
        "{config} --support labelled --images new --out new",
        nothing,
        "--out: new exists and holds no predictions; give another folder, or a name that ends in",
    ),
    "an output that is lost": (
        "{config} --support labelled --images new --out memory://b/found.csv",
        nothing,
        "--out: memory://b/found.csv is lost when the command ends; give",
    ),
    "a page that is no page": (
        f"{USUAL} --html page.pdf",
        nothing,
        "--html: page.pdf ends in .pdf; give a name that ends in .html",
    ),
    "a page that exists": (
        f"{USUAL} --html page.html",
        write("page.html", "mine"),
        "--html: page.html exists; move it away, or give another name",
    ),
    "workers and a file": (
        f"{USUAL} --workers 2",
        nothing,
        "--out: found.csv is a file, and workers write a file a chunk; give a folder",
    ),
    # the model
    "no checkpoint": (
        "{config} name=untrained --support labelled --images new --out found.csv",
        nothing,
        "/runs/untrained: holds no checkpoint; run `raymaml train CONFIG` first",
    ),
    "no config": (
        "nowhere.yaml --support labelled --images new --out found.csv",
        nothing,
        "nowhere.yaml: cannot be read (",
    ),
    "a config that is wrong": (
        "{config} model.nrom=context --support labelled --images new --out found.csv",
        nothing,
        "model.nrom ... did you mean norm?",
    ),
    "neither CONFIG nor --model": (
        "--support labelled --images new --out found.csv",
        nothing,
        "CONFIG and --model are both missing; give one of them",
    ),
    "CONFIG and --model": (
        f"{USUAL} --model new",
        nothing,
        "CONFIG and --model are both given; give one of them",
    ),
    "a folder that is no model": (
        "--model new --support labelled --images new --out found.csv",
        nothing,
        "raymaml: new: holds no checkpoint; run `raymaml train CONFIG` first",
    ),
    "no GPU": (
        "{config} cluster.device=cuda --support labelled --images new --out found.csv",
        nothing,
        "cluster.device is cuda but this process sees no GPU; set cluster.device to cpu or auto",
    ),
    # all at once
    "three at once": (
        "{config} --support new --images nowhere --out found.xlsx",
        nothing,
        "--out: found.xlsx ends in ... --images: nowhere does not exist ... --support: new holds",
    ),
}


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(
    name: str,
    make_config: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, mess, wanted = MISTAKES[name]
    runs = {"config": INDUCTIVE, "learned": ("model.norm=context", "model.head=learned")}
    files = {
        key: config_file(trained(make_config, tmp_path_factory, *overrides))
        for key, overrides in runs.items()
        if f"{{{key}}}" in line
    }
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path)
    mess(tmp_path)
    before = contents(tmp_path)
    said = predict(*shlex.split(line.format(**files)), code=2)
    assert contents(tmp_path) == before
    assert said.stdout == ""
    position = 0
    for part in wanted.split(" ... "):
        assert part in said.stderr[position:], said.stderr
        position = said.stderr.index(part, position) + len(part)
    if " ... " not in wanted and wanted.count(";") < 2:
        assert said.stderr.count("\n") == 1, said.stderr


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 20
