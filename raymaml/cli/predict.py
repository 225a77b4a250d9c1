"""``raymaml predict``: its arguments."""

from __future__ import annotations

import os
from functools import partial

import click

from raymaml.cli.options import (
    OPTIONAL_CONFIG,
    OVERRIDES,
    as_place,
    load,
    reports_user_errors,
    say_line,
)
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.storage.place import Place


@click.command()
@OPTIONAL_CONFIG
@OVERRIDES
@click.option(
    "--model", "folder", metavar="DIR", type=as_place, help="A run or a saved classifier."
)
@click.option("--support", metavar="PLACE", help="A folder a class, or a CSV (path,class).")
@click.option(
    *("--images", "-i"),
    metavar="PLACE",
    multiple=True,
    required=True,
    help="A folder, picture, CSV (path) or pattern in quotes; may be given again.",
)
@click.option(
    "--out", metavar="PLACE", type=as_place, required=True, help="A .csv, .parquet or folder."
)
@click.option("--html", metavar="FILE", type=as_place, help="Write a page with the pictures too.")
@click.option(
    "--group", type=click.IntRange(min=1), help="Pictures judged together (transductive)."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Workers of Ray Data; --out is a folder."
)
@reports_user_errors
def predict(
    *,
    config_path: Place | None,
    overrides: tuple[str, ...],
    folder: Place | None,
    support: str | None,
    images: tuple[str, ...],
    out: Place,
    html: Place | None,
    group: int | None,
    workers: int | None,
) -> None:
    """Name the classes of pictures, by a model that adapts to a few pictures of each class.

    The model is that of CONFIG's run, or of --model. With --workers, or RAY_ADDRESS and a folder as
    --out, Ray does the work; run again, it goes on from the shards that are written.
    """
    from raymaml.classify.predict import Request
    from raymaml.classify.predict import predict as run_predict

    on_ray = workers is not None or ("RAY_ADDRESS" in os.environ and not out.suffix)
    if workers is not None and out.suffix:
        raise UserError(
            f"--out: {out} is a file, and workers write a file a chunk",
            remedy="give a folder (a name without a suffix), or leave --workers out",
        )
    run = None
    if on_ray:
        from raymaml.cluster.predict import predict_on_cluster

        run = partial(predict_on_cluster, workers=workers, echo=say_line)
    request = Request(
        model=_model(config_path, overrides, folder),
        support=support,
        images=images,
        out=out,
        html=html,
        group=group,
    )
    say_line(run_predict(request, run, say_line))


def _model(path: Place | None, overrides: tuple[str, ...], folder: Place | None) -> Config | Place:
    """Return the config of the run, or the folder that --model names."""
    for word in overrides:
        if "=" not in word and os.path.lexists(word):
            raise UserError(
                f"{word} stands where an override should",
                remedy="put a pattern in quotes: --images 'new/*.png'",
            )
    if path is not None and folder is None:
        return load(path, overrides)
    if path is None and folder is not None:
        return folder
    both = "both given" if path else "both missing"
    raise UserError(f"CONFIG and --model are {both}", remedy="give one of them")
