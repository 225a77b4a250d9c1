"""Ray Data predicts what one process predicts, to the bit; killed and run again, it goes on."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from machinery import Command

from raymaml.classify.predict import Request, predict
from raymaml.classify.rows import Prediction
from raymaml.training.worker import train_locally


@pytest.fixture
def request_of(make_config: Any, tiny_bank: Any, tmp_path: Path) -> Callable[..., Request]:
    """``request_of(rows, out)``: a request for a list of ``rows`` pictures, one of them broken."""
    from PIL import Image

    config = make_config("run", "model.norm=context", "model.head=zero", "outer.num_steps=1")
    assert train_locally(config, lambda _line: None)
    for way in range(3):
        for number, image in enumerate(tiny_bank.class_images(17 + way)):
            path = tmp_path / ("new" if number > 1 else "labelled") / f"{way}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0].copy()).save(path)
    (tmp_path / "new" / "broken.png").write_text("text")
    names = sorted(path.relative_to(tmp_path) for path in (tmp_path / "new").rglob("*.png"))

    def make(count: int, out: str) -> Request:
        lines = "\n".join(str(names[row % len(names)]) for row in range(count))
        (tmp_path / "list.csv").write_text(f"path\n{lines}\n")
        return Request(
            model=config,
            support=str(tmp_path / "labelled"),
            images=[str(tmp_path / "list.csv")],
            out=tmp_path / out,
        )

    return make


def test_reader_and_judge_write_the_rows_of_one_process(request_of: Any, tmp_path: Path) -> None:
    """What Ray's processes do, in this one: everything travels as they send it."""
    from raymaml.cluster import predict as on_ray

    alone, together = request_of(600, "alone.parquet"), request_of(600, "together")
    predict(alone, None, print)

    def run(prediction: Prediction, numbers: Sequence[int], folder: Path) -> None:
        sent = pickle.loads(pickle.dumps(prediction))
        cluster = sent.classifier.trained.config.cluster
        judge = on_ray._Judge(sent, folder, cluster, False)
        for number in reversed(numbers):
            task = pa.Table.from_pylist([on_ray._task(number, sent.reader.chunk(number))])
            judge(on_ray._read(task, preprocessing=sent.reader.preprocessing))

    predict(together, run, print)
    assert pq.read_table(together.out).equals(pq.read_table(alone.out))


@pytest.mark.ray
def test_two_workers_give_the_bits_of_one_process(
    cluster: None, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymaml.cluster.predict import predict_on_cluster

    alone, together = request_of(1300, "alone.parquet"), request_of(1300, "together")
    assert predict(alone, None, print).startswith(
        "1,232 pictures predicted, of 3 classes, 68 could"
    )
    predict(together, partial(predict_on_cluster, workers=2, echo=print), print)
    parts = sorted(together.out.glob("*.parquet"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [512, 512, 276]
    assert pq.read_table(together.out).equals(pq.read_table(alone.out))


@pytest.mark.ray
def test_killed_and_run_again_it_goes_on(
    joining: dict[str, str], request_of: Any, start: Any, tmp_path: Path
) -> None:
    alone, together = request_of(8000, "alone.parquet"), request_of(8000, "together")
    predict(alone, None, print)
    arguments = ("--support", alone.support, "--images", alone.images[0], "--out", together.out)
    words = ["predict", tmp_path / "run" / "config.yaml", *arguments, "--workers", "1"]
    command: Command = start(*map(str, words), **joining)
    parts = lambda: sorted(together.out.glob("*.parquet"))  # noqa: E731
    command.wait_until(lambda: len(parts()) >= 2, "at the second shard")
    command.kill()
    there = {part: part.stat().st_mtime_ns for part in parts()}
    assert 2 <= len(there) < 16
    again: Command = start(*map(str, words), **joining)
    assert again.finish() == 0, again.errors
    assert again.lines[-1].startswith("7,579 pictures predicted, of 3 classes, 421 could not be")
    assert len(parts()) == 16
    assert {part: part.stat().st_mtime_ns for part in there} == there
    assert pq.read_table(together.out).equals(pq.read_table(alone.out))
