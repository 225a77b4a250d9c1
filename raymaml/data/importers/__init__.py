"""From a data set as the community distributes it to an image bank."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from raymaml.common.errors import Mistakes, UserError
from raymaml.config.schema import AllEpisodes, DataConfig, Split
from raymaml.config.sources import AnySource
from raymaml.data.bank import ClassStream, ImageBank, write_bank
from raymaml.data.importers.cifar import plan_cifar
from raymaml.data.importers.cub import plan_cub
from raymaml.data.importers.glyphs import plan_glyphs
from raymaml.data.importers.image_folder import plan_image_folder
from raymaml.data.importers.images import Images
from raymaml.data.importers.inaturalist import plan_inaturalist
from raymaml.data.importers.mini_imagenet import plan_mini_imagenet
from raymaml.data.importers.omniglot import plan_omniglot
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.data.importers.tiered_imagenet import plan_tiered_imagenet
from raymaml.data.sampling import fit_problems, listed
from raymaml.storage.place import is_remote

Parts = Iterable[tuple[PlannedClass, Iterator[slice]]]
"""Classes, each with the ranges of its images that are not read yet."""


def import_bank(
    data: DataConfig, episodes: AllEpisodes, report: Callable[[str], object] = str
) -> ImageBank:
    """Read ``data.source`` class by class into the bank ``data.bank``.

    Args:
        data: the source, the image size and the bank.
        episodes: the classes must have enough images for them.
        report: takes each line about files that the import leaves out, once the bank is there.

    Raises:
        UserError: listing every broken image, empty class, class in two splits, and every class
            or split too small for ``episodes``; nothing half-written stays behind.
    """
    # an import unpacks beside the bank, or beside the copy of one that goes to a URI
    beside = Path(tempfile.gettempdir(), "bank") if is_remote(data.bank) else data.bank
    try:
        plan = _plan(data.source, data.image_size, beside)
        bank = write_bank(
            data.bank,
            _load(plan, episodes, plan.num_channels * data.image_size**2),
            source=plan.source,
            licence=plan.licence,
            image_shape=(plan.num_channels, data.image_size, data.image_size),
            cache=data.cache,
        )
    except UserError as error:
        raise type(error)(*listed(error.problems)) from None
    for note in plan.notes:
        report(note)
    return bank


def _plan(source: AnySource, image_size: int, bank: Path) -> ImportPlan:
    """List the classes of a source, by its kind."""
    planners: dict[str, Callable[[Any, int], ImportPlan]] = {
        "glyphs": plan_glyphs,
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


def _load(plan: ImportPlan, episodes: AllEpisodes, image_bytes: int) -> Iterator[ClassStream]:
    """Yield the classes one by one, as streams; raise all mistakes together."""
    classes = ((planned, planned.parts(image_bytes)) for planned in plan.classes)
    mistakes = [*plan.problems, *_split_problems(plan, episodes)]
    if mistakes:  # a bank that will not be kept need not be written
        raise UserError(*mistakes, *_broken(classes))
    for planned, parts in classes:
        yield ClassStream(
            name=planned.name,
            split=planned.split,
            count=planned.count,
            batches=_batches(planned, parts, classes),
        )


def _batches(planned: PlannedClass, parts: Iterator[slice], rest: Parts) -> Iterator[Images]:
    """Yield the images of a class; raise all mistakes in them and in the ``rest``."""
    for part in parts:
        try:
            images = planned.read(part)
        except UserError as error:
            broken = _broken(chain([(planned, parts)], rest))
            raise UserError(*error.mistakes, *broken) from None
        yield images


def _broken(classes: Parts) -> Mistakes:
    """Read parts of classes for their mistakes alone."""
    mistakes = Mistakes()
    for planned, parts in classes:
        for part in parts:
            with mistakes.kept():
                planned.read(part)
    return mistakes


def _split_problems(plan: ImportPlan, episodes: AllEpisodes) -> list[str]:
    splits_of: dict[str, set[str]] = defaultdict(set)
    for planned in plan.classes:
        splits_of[planned.name].add(planned.split)
    problems = [
        f"class {name}: is in the splits {' and '.join(sorted(splits))}; keep it in one"
        for name, splits in splits_of.items()
        if len(splits) > 1
    ]
    repeated = Counter((planned.split, planned.name) for planned in plan.classes)
    problems += [
        f"class {name} of split {split}: is there {count} times; give each class a name of its own"
        for (split, name), count in repeated.items()
        if count > 1
    ]
    problems += [
        f"class {name!r}: its name is no text that UTF-8 can write; rename it"
        for name in splits_of
        if name != name.encode(errors="ignore").decode()
    ]
    for split in get_args(Split):
        counts = {p.name: p.count for p in plan.classes if p.split == split and p.count}
        problems += fit_problems(episodes.of(split), split, counts, plan.share)
    return problems
