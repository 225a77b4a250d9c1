"""``raymaml predict``: adapt a trained model to a support set, and name the class of pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raymaml.classify.classifier import FewShotClassifier
from raymaml.classify.output import (
    SUFFIXES,
    begin_folder,
    check_folder,
    check_output,
    is_folder,
    missing_shards,
    read_shard,
    write_file,
    write_shard,
)
from raymaml.classify.page import MOST_SHOWN, Tally, page
from raymaml.classify.pictures import (
    Picture,
    Support,
    content_key,
    list_images,
    list_support,
    refuse_shared,
)
from raymaml.classify.reading import Reader
from raymaml.classify.rows import Prediction, local_rows
from raymaml.common.errors import UserError, gathered
from raymaml.common.untrusted import json_text
from raymaml.config.schema import Config
from raymaml.storage.files import write_text
from raymaml.storage.place import Place
from raymaml.training.settings import local_device, prepare_process

Echo: TypeAlias = Callable[[str], None]
Run: TypeAlias = Callable[[Prediction, Sequence[int], Place], None]
"""Writes the shards of chunks into a folder."""
Pixels: TypeAlias = NDArray[np.uint8]
ANNOUNCE_SECONDS = 10.0
"""Between two lines on how far it is."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of ``raymaml predict``."""

    model: Config | Place
    """A run, by its config or its folder, or a classifier that was saved."""
    support: str | None
    """A folder with a folder a class, or a CSV; None: those of a saved classifier."""
    images: Sequence[str]
    """Folders, pictures, CSVs, patterns."""
    out: Place
    """A CSV, a Parquet file, or (without a suffix) a folder for a Parquet file a chunk."""
    html: Place | None = None
    """A page for people."""
    group: int | None = None
    """Pictures that a transductive model judges together; None: as many as in its test episodes."""


def predict(request: Request, run: Run | None, echo: Echo) -> str:
    """Write the predictions; return the line that ends the command.

    Args:
        request: what is asked for.
        run: judges the chunks that a folder lacks; None: this process does.
        echo: is given each line before the last.

    Raises:
        UserError: arguments, model or pictures are wrong; nothing is written.
    """
    classifier, support, images = _opened(request, on_cpu=run is not None, echo=echo)
    shown = _fit(classifier, support)
    reader = Reader(
        preprocessing=classifier.preprocessing, pictures=images, group=classifier.group or 1
    )
    prediction = Prediction(classifier=classifier, reader=reader)
    folder = is_folder(request.out)
    record = _record(prediction, support)
    if folder:
        check_folder(request.out, record)
    lines = list(_remarks(prediction, shown))
    for line in lines:
        echo(line)
    tally = Tally(classes=prediction.classes, most_shown=MOST_SHOWN if request.html else 0)
    numbers = range(reader.num_chunks)
    if folder:
        begin_folder(request.out, record)
        if missing := missing_shards(request.out, len(numbers)):
            (run or partial(_fill, echo=echo))(prediction, missing, request.out)
        for number in numbers:
            tally.add(read_shard(request.out, number))
    else:
        rows = _announced(local_rows(prediction, numbers), len(images), echo)
        write_file(request.out, prediction.schema, _counted(rows, tally))
    if request.html is not None:
        places = [picture.place for picture in images]
        html = page(tally, lines, shown, lambda row: reader.preprocessing.pixels(places[row]))
        write_text(request.html, html)
    broken = f", {tally.num_errors:,} could not be read" if tally.num_errors else ""
    done = tally.num_rows - tally.num_errors
    return f"{done:,} pictures predicted, of {len(tally.classes)} classes{broken}: {request.out}"


def _opened(
    request: Request, *, on_cpu: bool, echo: Echo
) -> tuple[FewShotClassifier, Support, list[Picture]]:
    """Return the open classifier, the support set and the pictures.

    Raises:
        UserError: with all mistakes of model, lists and outputs.
    """
    support: Support = {}
    images: list[Picture] = []
    with gathered() as mistakes:
        with mistakes.kept():
            check_output(request.out, "--out", SUFFIXES)
        with mistakes.kept():
            if request.html is not None:
                check_output(request.html, "--html", (".html",))
        with mistakes.kept():
            images = list_images(request.images, echo)
        with mistakes.kept():
            support = {} if request.support is None else list_support(request.support, echo)
        with mistakes.kept():
            refuse_shared(support, images)
        with mistakes.kept():
            classifier = _classifier(request, on_cpu=on_cpu)
    return classifier, support, images


def _classifier(request: Request, *, on_cpu: bool) -> FewShotClassifier:
    """Open the model, on the device that its config names, or on the CPU."""
    device = None
    if on_cpu:
        device = "cpu"
    elif isinstance(request.model, Config):
        device = str(local_device(request.model.cluster))
    classifier = FewShotClassifier.load(request.model, device=device)
    if request.support is None and not classifier.__sklearn_is_fitted__():
        raise UserError(
            "--support is missing: the model of a run has no classes of its own",
            remedy="give the folder that holds a folder of pictures for each class",
        )
    trained = classifier.trained
    if trained.config.model.is_transductive:
        episodes = trained.config.episodes.test
        group = request.group or episodes.num_ways * episodes.num_queries
        classifier.set_params(group=group)
    prepare_process(trained.config.cluster, next(trained.learner.model.parameters()).device)
    return classifier


def _fit(classifier: FewShotClassifier, support: Support) -> dict[str, list[tuple[str, Pixels]]]:
    """Adapt the classifier; return names and pixels of the support images, by class.

    Raises:
        UserError: naming all that cannot be read; or the number of classes does not fit.
    """
    shown: dict[str, list[tuple[str, Pixels]]] = {name: [] for name in support}
    pairs = [(name, picture) for name, pictures in support.items() for picture in pictures]
    with gathered() as mistakes:
        for name, picture in pairs:
            with mistakes.kept():
                pixels = classifier.preprocessing.pixels(picture.place)
                shown[name].append((picture.name, pixels))
    if pairs:
        pixels = np.stack([image for images in shown.values() for _, image in images])
        classifier.fit_pixels(pixels, [name for name, _ in pairs])
    return shown


def _remarks(prediction: Prediction, shown: dict[str, list[tuple[str, Pixels]]]) -> Iterator[str]:
    """Yield the model, what is known of the accuracy, and the warning of a transductive model."""
    classifier, trained = prediction.classifier, prediction.classifier.trained
    of = f"of {trained.config.steps.num_steps:,} outer steps"
    yield f"model: {trained.config.name}, {trained.checkpoint} {of}"
    if shown:
        with _threads(len(os.sched_getaffinity(0))):
            found = classifier.leave_one_out()
        if found is None:
            few = min(shown, key=lambda name: len({image.tobytes() for _, image in shown[name]}))
            copies = ", the others are copies" if len(shown[few]) > 1 else ""
            yield (
                f"accuracy: nothing can be estimated, since class {few} has one support image"
                f"{copies}; give two or more of each class"
            )
        else:
            low, high = found.interval.low, found.interval.high
            among = ", each judged among the others" if classifier.caution else ""
            yield (
                f"leave-one-out accuracy on the support set: {found.accuracy:.1%} (95% interval"
                f" {low:.1%} to {high:.1%}, {found.folds} folds{among})"
            )
    if classifier.caution:
        yield f"warning: {classifier.caution}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` threads in the block, or more if it does already."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _record(prediction: Prediction, support: Support) -> dict[str, object]:
    """Return what decides the shards of a folder."""
    trained, reader = prediction.classifier.trained, prediction.reader
    settings = {"model": trained.config.model, "inner": trained.config.test_inner}
    model = {name: each.model_dump(mode="json") for name, each in settings.items()}
    model["cluster"] = {"precision": trained.config.cluster.precision}
    shots = {name: sorted(map(content_key, own)) for name, own in support.items()}
    pictures = hashlib.sha256()
    for picture in reader.pictures:
        pictures.update(f"{picture.name}\n".encode())
    return {
        "model": _hash(json_text([trained.origin, model])),
        "set of classes": prediction.classes,
        "support set": _hash(json_text(shots)) if support else prediction.classifier.digest,
        "list of pictures": pictures.hexdigest(),
        "number of pictures": len(reader.pictures),
        "group": reader.group,
        "chunk": reader.chunk_size,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fill(prediction: Prediction, numbers: Sequence[int], folder: Place, echo: Echo) -> None:
    """Write the shards of chunks from this process."""
    count = min(len(numbers) * prediction.reader.chunk_size, len(prediction.reader.pictures))
    rows = _announced(local_rows(prediction, numbers), count, echo)
    for number, table in zip(numbers, rows, strict=True):
        write_shard(folder, number, table)


def _counted(tables: Iterable[pa.Table], tally: Tally) -> Iterator[pa.Table]:
    for table in tables:
        tally.add(table)
        yield table


def _announced(tables: Iterable[pa.Table], count: int, echo: Echo) -> Iterator[pa.Table]:
    """Say now and then how far it is."""
    done, said = 0, monotonic()
    for table in tables:
        yield table
        done += table.num_rows
        if monotonic() - said > ANNOUNCE_SECONDS and done < count:
            said = monotonic()
            echo(f"{done:,} of {count:,} pictures")
