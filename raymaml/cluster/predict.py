"""Ray Data: the chunks of a prediction, read by tasks and judged by actors on CPUs or GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from raymaml.classify.output import write_shard
from raymaml.classify.pictures import Picture
from raymaml.classify.predict import ANNOUNCE_SECONDS
from raymaml.classify.reading import Chunk, read_chunk
from raymaml.classify.rows import Prediction
from raymaml.cluster.explain import cluster_failed, user_error
from raymaml.cluster.runtime import call_in_thread, connected
from raymaml.cluster.workers import READER_CPUS, plan_workers, worker_resources
from raymaml.config.schema import ClusterConfig
from raymaml.data.preprocessing import Preprocessing
from raymaml.storage.place import Place, to_place
from raymaml.training.settings import prepare_process


def predict_on_cluster(
    prediction: Prediction,
    numbers: Sequence[int],
    folder: Place,
    *,
    workers: int | None,
    echo: Callable[[str], None],
) -> None:
    """Write the shards of chunks into ``folder``, in any order.

    Args:
        prediction: on the CPU; actors move it to their devices.
        numbers: of the chunks.
        folder: for the shards.
        workers: actors that judge; None: as many as the cluster has room for.
        echo: is given a line on how far it is now and then.

    Raises:
        UserError: the cluster is too small, fails, or met a mistake of the user's.
    """
    wanted = {"num_workers": workers or "auto", "min_workers": None}
    cluster = prediction.classifier.trained.config.cluster.model_copy(update=wanted)
    with connected(cluster):
        count, use_gpu = plan_workers(cluster, ray.cluster_resources())
        resources, reader = worker_resources(use_gpu), prediction.reader
        # each task has the pictures of its chunk, not the whole list
        tasks = ray.data.from_items(
            [_task(each, reader.chunk(each)) for each in numbers], override_num_blocks=len(numbers)
        )
        chunks = tasks.map_batches(
            partial(_read, preprocessing=reader.preprocessing),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READER_CPUS,
            concurrency=count,
        )
        written = chunks.map_batches(
            _Judge,
            fn_constructor_args=(
                replace(prediction, reader=replace(reader, pictures=())),
                folder.absolute(),
                cluster,
                use_gpu,
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            concurrency=min(count, len(numbers)),
        )
        written.context.enable_progress_bars = False
        try:
            call_in_thread(partial(_follow, written, len(numbers), echo))
        except Exception as error:
            kept = "every finished shard"
            raise user_error(error) or cluster_failed(error, folder, kept) from error


def _follow(written: Any, count: int, echo: Callable[[str], None]) -> None:
    """Wait for all shards; say now and then how many there are."""
    said = monotonic()
    for done, _ in enumerate(written.iter_rows(), 1):
        if monotonic() - said > ANNOUNCE_SECONDS and done < count:
            said = monotonic()
            echo(f"{done:,} of {count:,} shards")


def _task(number: int, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Return a chunk as a row: names may hold any bytes, which no text of Arrow does."""
    return {
        "number": number,
        "names": [picture.name for picture in pictures],
        "places": [os.fsencode(str(picture.place.absolute())) for picture in pictures],
    }


def _read(block: pa.Table, *, preprocessing: Preprocessing) -> pa.Table:
    """Return number, names, pixels and errors of the one chunk that a block lists."""
    (task,) = block.to_pylist()
    places = (to_place(os.fsdecode(place)) for place in task["places"])
    pictures = list(map(Picture, task["names"], places))
    chunk = read_chunk(task["number"], pictures, preprocessing)
    texts = (pa.array([each], pa.list_(pa.string())) for each in (chunk.names, chunk.errors))
    columns = [pa.array([chunk.number]), pa.array([chunk.pixels.tobytes()]), *texts]
    return pa.table(columns, names=["number", "pixels", "names", "errors"])


class _Judge:
    """Judges chunks and writes their shards."""

    def __init__(
        self,
        prediction: Prediction,
        folder: Place,
        cluster: ClusterConfig,
        use_gpu: bool,
    ) -> None:
        device = torch.device("cuda" if use_gpu else "cpu")
        prepare_process(cluster, device)
        prediction.classifier.to(device)
        self._prediction, self._folder = prediction, folder

    def __call__(self, block: pa.Table) -> pa.Table:
        channels, height, width = self._prediction.reader.preprocessing.image_shape
        pixels = np.frombuffer(block["pixels"][0].as_buffer(), np.uint8)
        chunk = Chunk(
            number=block["number"][0].as_py(),
            names=block["names"][0].as_py(),
            pixels=pixels.reshape(-1, height, width, channels),
            errors=block["errors"][0].as_py(),
        )
        write_shard(self._folder, chunk.number, self._prediction.judge(chunk))
        return pa.table({"number": [chunk.number]})
