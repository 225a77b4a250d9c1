"""mini-ImageNet (Vinyals et al. 2016, with the splits of Ravi and Larochelle 2017).

60,000 images of 100 classes of ImageNet, in four forms:

- pickles of either kind (``labelled_pickles.py``), 84x84;
- ``images/`` and CSVs of file names and classes, as Ravi and Larochelle published it;
- the class folders of ILSVRC 2012, from which the package's list of files picks the images (it is
  the list that easyfsl distributes).

Files are resized as Ravi and Larochelle's script does: to the square without regard to the
aspect, with Lanczos' filter. The WordNet ids of the classes decide the split of a file, or their
number, or the range of their labels (0-63, 64-79, 80-99), and its name only after these.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import accumulate
from pathlib import Path

from raymaml.common.errors import gathered
from raymaml.common.untrusted import stays_inside
from raymaml.config.data_sources import MiniImageNetSource
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.benchmark import (
    IMAGENET_LICENCE,
    Benchmark,
    LabelledFile,
    choose,
    listed_files,
    plan_files,
)
from raymaml.data.importers.folders import by_class, read_csv
from raymaml.data.importers.images import squashed
from raymaml.data.importers.labelled_pickles import files_in, labelled_pickles
from raymaml.data.importers.plan import ImportPlan

RAVI_CSV = "images and CSVs (Ravi and Larochelle)"
ILSVRC = "the class folders of ILSVRC 2012"
_CSV_HEADER = ["filename", "label"]
_WHERE_ILSVRC_KEEPS_THEM = ("", "train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train")


def plan_mini_imagenet(source: MiniImageNetSource, size: int) -> ImportPlan:
    """Find the three splits in ``source.path``: class folders first, then pickles, then CSVs.

    Raises:
        UserError: a file is damaged, a split is missing, or classes or images are.
    """
    folder = source.path
    files = _from_ilsvrc(folder) or labelled_pickles(folder) or _from_csvs(folder)
    return plan_files(choose(files, benchmark(), folder), benchmark(), source, size)


@cache
def benchmark() -> Benchmark:
    """Return the published facts."""
    return Benchmark(
        title="mini-ImageNet",
        cited="(Vinyals et al. 2016, splits of Ravi and Larochelle 2017)",
        licence=IMAGENET_LICENCE,
        num_classes={"train": 64, "val": 16, "test": 20},
        num_images={"train": 38_400, "val": 9_600, "test": 12_000},
        images_per_class=600,
        names={split: frozenset(files) for split, files in ilsvrc_files().items()},
        labels={"train": range(64), "val": range(64, 80), "test": range(80, 100)},
    )


@cache
def ilsvrc_files() -> dict[Split, dict[str, list[str]]]:
    """Return the files of ILSVRC 2012's training set that mini-ImageNet consists of.

    Split -> WordNet id -> file names. The list of the package has a line a class: split, id, and
    the sorted numbers of its files, each but the first as the difference to the one before.
    """
    packed = resources.files(__package__).joinpath("mini_imagenet.txt.xz").read_bytes()
    found: dict[Split, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for line in lzma.decompress(packed).decode().splitlines():
        split, wnid, *steps = line.split()
        names = [f"{wnid}_{number}.JPEG" for number in accumulate(map(int, steps))]
        next(found[own] for own in SPLITS if own == split)[wnid] = names
    return found


def _from_ilsvrc(folder: Path) -> list[LabelledFile]:
    for place in (folder / part for part in _WHERE_ILSVRC_KEEPS_THEM):
        found = [
            {wnid: own for wnid, names in classes.items() if (own := _those(place / wnid, names))}
            for classes in ilsvrc_files().values()
        ]
        if any(found):
            return [_labelled(str(place), ILSVRC, files) for files in found if files]
    return []


def _those(folder: Path, names: Sequence[str]) -> list[Path]:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return [folder / name for name in names if name in there]


def _from_csvs(folder: Path) -> list[LabelledFile]:
    tables = [path for path in files_in(folder) if path.suffix.lower() == ".csv"]
    found = {table: _read_csv(table) for table in tables}
    return [_labelled(str(table), RAVI_CSV, files) for table, files in found.items() if files]


def _read_csv(table: Path) -> dict[str, list[Path]]:
    """Return the files of each class; nothing where the header is another."""
    header, *rows = read_csv(table, f"{table}:", "get it again") or [[]]
    images = table.parent / "images"
    folder = images if images.is_dir() else table.parent

    def parse(row: Sequence[str]) -> tuple[str, Path]:
        if len(row) != len(_CSV_HEADER) or not stays_inside(row[0]):
            raise ValueError("must give filename and label; mend the line")
        return row[1], folder / row[0]

    if header != _CSV_HEADER:
        return {}
    with gathered() as mistakes:
        return by_class(table, rows, parse, mistakes)


def _labelled(name: str, form: str, files: Mapping[str, Sequence[Path]]) -> LabelledFile:
    """Number the classes of listed files by name."""
    names = dict(enumerate(sorted(files)))
    by_number = {number: files[own] for number, own in names.items()}
    return listed_files(by_number, squashed, name=name, form=form, class_names=names)
