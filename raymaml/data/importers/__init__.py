"""From a data set as the community distributes it to an image bank."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import Mistakes, UserError, gathered
from raymaml.config.data_sources import AnySource, GlyphsSource
from raymaml.config.schema import SPLITS, AllEpisodes, DataConfig
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import BankClass, ClassImages
from raymaml.data.duplicates import Fingerprints
from raymaml.data.importers.cifar import plan_cifar
from raymaml.data.importers.copies import sort_out
from raymaml.data.importers.cub import plan_cub
from raymaml.data.importers.image_folder import plan_image_folder
from raymaml.data.importers.inaturalist import plan_inaturalist
from raymaml.data.importers.mini_imagenet import plan_mini_imagenet
from raymaml.data.importers.omniglot import plan_omniglot
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.data.importers.tiered_imagenet import plan_tiered_imagenet
from raymaml.data.sampling import fit_problems, fitted, listed
from raymaml.storage.place import is_remote

NAMED = 10
"""Classes of each split that an import names."""


def import_bank(
    data: DataConfig, episodes: AllEpisodes, report: Callable[[str], object] = str
) -> ImageBank:
    """Read ``data.source`` class by class into the bank ``data.bank``.

    Args:
        data: the source, the image size and the bank.
        episodes: the classes must have enough images for them.
        report: takes a line for each split, with its classes, and each line about files that the
            import leaves out and about copies, once the bank is there.

    Raises:
        UserError: listing every broken image, empty class, class in two splits, and every class
            or split too small for ``episodes``, and copies that the source refuses; nothing
            half-written stays behind.
    """
    prints, lines = Fingerprints(), list[str]()

    def finish(unfinished: ImageBank) -> dict[str, Any]:
        changes, found = sort_out(unfinished, prints, plan, data.source, episodes)
        lines.extend(found)
        return changes

    # an import unpacks beside the bank, or beside the copy of one that goes to a URI
    beside = Path(tempfile.gettempdir(), "bank") if is_remote(data.bank) else data.bank
    try:
        plan = plan_import(data.source, data.image_size, beside)
        image_shape = (plan.num_channels, data.image_size, data.image_size)
        bank = write_bank(
            data.bank,
            _streams(plan, episodes, image_shape),
            source=plan.source,
            licence=plan.licence,
            image_shape=image_shape,
            cache=data.cache,
            observe=prints.add,
            finish=finish,
        )
    except UserError as error:
        raise type(error)(*listed(error.problems)) from None
    for line in (*plan.notes, *lines, *_class_lines(bank)):
        report(line)
    return bank


def _class_lines(bank: ImageBank) -> Iterator[str]:
    """Yield the first classes of each split, by the names that they have from now on."""
    for split in SPLITS:
        ids = bank.class_ids(split).tolist()
        names = ", ".join(bank.classes[class_id].name for class_id in ids[:NAMED])
        yield f"{split}: {names}" + f" and {len(ids) - NAMED} more" * (len(ids) > NAMED)


def plan_import(source: AnySource, image_size: int, bank: Path) -> ImportPlan:
    """List the classes of a source, by its kind; archives are unpacked beside ``bank``.

    Raises:
        UserError: files of the source are missing or damaged.
    """
    if source.kind != "glyphs" and not source.path.is_dir():
        may_be_archive = source.kind in {"cifar-fs", "fc100", "cub"}
        if not (may_be_archive and source.path.is_file()):
            kinds = "a folder or an archive" if may_be_archive else "a folder"
            problem = f"data.source.path: {source.path} is not {kinds}"
            raise UserError(problem, remedy="give one that exists")
    planners: dict[str, Callable[[Any, int], ImportPlan]] = {
        "glyphs": _plan_glyphs,
        "omniglot": plan_omniglot,
        "image-folder": plan_image_folder,
        "mini-imagenet": plan_mini_imagenet,
        "tiered-imagenet": partial(plan_tiered_imagenet, bank=bank),
        "cifar-fs": partial(plan_cifar, bank=bank),
        "fc100": partial(plan_cifar, bank=bank),
        "cub": partial(plan_cub, bank=bank),
        "inaturalist-2017": plan_inaturalist,
    }
    return planners[source.kind](source, image_size)


def _plan_glyphs(source: GlyphsSource, image_size: int) -> ImportPlan:
    from raymaml.data.importers.glyphs import plan_glyphs  # loads matplotlib

    return plan_glyphs(source, image_size)


def _streams(
    plan: ImportPlan, episodes: AllEpisodes, image_shape: tuple[int, int, int]
) -> Iterator[ClassImages]:
    """Yield the classes one by one; raise all mistakes together, after the last class."""
    with gathered() as mistakes:
        mistakes += [*plan.problems, *_split_problems(plan, episodes)]
        is_written = not mistakes  # else the images are read for their mistakes alone
        for planned in plan.classes:
            batches = _batches(planned, image_shape, mistakes)
            if is_written:
                entry = BankClass(name=planned.name, split=planned.split, count=planned.count)
                yield entry, batches
            for _ in batches:
                pass


def _batches(
    planned: PlannedClass, image_shape: tuple[int, int, int], mistakes: Mistakes
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images of a class; blank ones for a part with mistakes: its bank is not kept."""
    channels, height, width = image_shape
    for part in planned.parts(channels * height * width):
        images = np.zeros((len(part), height, width, channels), np.uint8)
        with mistakes.kept():
            images = planned.read(part)
        yield images


def _split_problems(plan: ImportPlan, episodes: AllEpisodes) -> list[str]:
    splits_of: dict[str, list[str]] = defaultdict(list)
    for planned in plan.classes:
        splits_of[planned.name].append(planned.split)
    problems = [
        f"class {name}: is in the splits {' and '.join(sorted(set(splits)))}; keep it in one"
        for name, splits in splits_of.items()
        if len(set(splits)) > 1
    ]
    problems += [
        f"class {name} of split {split}: is there {count} times; give each class a name of its own"
        for name, splits in splits_of.items()
        for split, count in Counter(splits).items()
        if count > 1
    ]
    problems += [
        f"class {name!r}: its name is no text that UTF-8 can write; rename it"
        for name in splits_of
        if name != name.encode(errors="ignore").decode()
    ]
    for split in SPLITS:
        counts = {p.name: p.count for p in plan.classes if p.split == split and p.count}
        spec = fitted(episodes, split, counts.values())
        problems += fit_problems(spec, split, counts, plan.share)
    return problems
