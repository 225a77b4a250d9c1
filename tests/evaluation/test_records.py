"""Records: whole or not at all, the same for any partition, refused by name if they do not fit."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_evaluation import record as make_record

from raymaml.common.errors import StorageError, UserError
from raymaml.evaluation import record_files
from raymaml.evaluation.record_files import (
    chunk_path,
    leading_accuracies,
    missing_chunks,
    read_circumstances,
    read_records,
    write_chunk,
)
from raymaml.evaluation.records import Record, identity_of, record_arrays

IDENTITY = {"checkpoint": "c0ffee", "episodes": "feed"}


def record(episode: int, num_steps: int = 2) -> Record:
    by_step = tuple(((episode * 7 + step) % 76) / 75 for step in range(num_steps + 1))
    losses = (2.0,) * num_steps + (1 / (episode + 3),)
    ids = (episode % 11, 20, 30, 40, 50)
    return make_record(episode, accuracy_by_step=by_step, loss_by_step=losses, class_ids=ids)


def write(folder: Path, first: int, count: int, identity: dict[str, str] = IDENTITY) -> Path:
    path = chunk_path(folder, first, count)
    write_chunk(path, [record(episode) for episode in range(first, first + count)], identity)
    return path


def problems(source: Path, **expected: int) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read_records(source, expected.get("num_episodes"))
    return caught.value.problems


def test_any_partition_gives_the_same_table(tmp_path: Path) -> None:
    tables = []
    for size in (1, 7, 500):
        folder = tmp_path / str(size)
        for first in range(0, 500, size):
            write(folder, first, min(size, 500 - first))
        assert len(list(folder.iterdir())) == -(-500 // size)
        tables.append(read_records(folder, 500, IDENTITY))
    assert all(table.equals(tables[0], check_metadata=True) for table in tables)
    assert tables[0].column("episode").to_pylist() == list(range(500))


def test_what_is_written_is_read_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path, 10, 5)
    table = read_records(tmp_path)
    assert table.to_pylist() == [
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in record(episode).items()
        }
        for episode in range(10, 15)
    ]
    assert identity_of(table) == IDENTITY


def test_arrays_hold_the_columns(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 3, 2)
    arrays = record_arrays(read_records(tmp_path, 4))
    assert arrays.episode.tolist() == [0, 1, 2, 3]
    assert arrays.accuracy_by_step.shape == (4, 3)
    assert arrays.accuracy_by_step[3].tolist() == [21 / 75, 22 / 75, 23 / 75]  # 3 * 7 = 21
    assert arrays.accuracy.tolist() == arrays.accuracy_by_step[:, -1].tolist()
    assert arrays.class_ids[2].tolist() == [2, 20, 30, 40, 50]
    assert arrays.loss.tolist() == [1 / 3, 1 / 4, 1 / 5, 1 / 6]


@pytest.mark.fault("records torn")
def test_a_torn_chunk_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 10)
    whole = path.read_bytes()
    for size in range(0, len(whole), 101):
        path.write_bytes(whole[:size])
        assert missing_chunks(tmp_path, 10, 10, IDENTITY) == [range(10)], size


def test_an_altered_chunk_is_missing_unless_its_records_are_untouched(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 10)
    whole, records = path.read_bytes(), read_records(tmp_path)
    refused = 0
    for position in range(0, len(whole), 13):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        if missing_chunks(tmp_path, 10, 10, IDENTITY):
            refused += 1
        else:
            assert read_records(tmp_path).equals(records), position
    assert refused > 100  # of about 220 flips; the others hit what no record depends on


def test_a_killed_writer_s_hidden_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 2)
    (tmp_path / f".{path.name}.0123.tmp").write_bytes(b"PAR1")
    assert len(read_records(tmp_path, 2)) == 2


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "at least one"),
        ([record(0), record(2)], "consecutive"),
        ([record(1), record(0)], "consecutive"),
        ([record(0), record(1, num_steps=3)], "length|expected"),
    ],
)
def test_a_chunk_that_makes_no_sense_is_not_written(
    tmp_path: Path, records: list[Record], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_chunk(tmp_path / "chunk.parquet", records, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_circumstances_are_kept_beside_the_records_and_not_compared(tmp_path: Path) -> None:
    for first, hardware in ((0, "an abacus"), (2, "a slide rule"), (4, "an abacus")):
        records = [record(first), record(first + 1)]
        write_chunk(chunk_path(tmp_path, first, 2), records, IDENTITY, {"hardware": hardware})
        assert missing_chunks(tmp_path, first + 2, 10, IDENTITY) == []
    assert identity_of(read_records(tmp_path, 6, IDENTITY)) == IDENTITY
    found = read_circumstances(tmp_path)
    assert found == [{"hardware": "a slide rule"}, {"hardware": "an abacus"}]


def test_leading_accuracies_end_at_the_first_hole(tmp_path: Path) -> None:
    assert leading_accuracies(tmp_path, IDENTITY).tolist() == []
    write(tmp_path, 5, 5)
    assert leading_accuracies(tmp_path, IDENTITY).tolist() == []
    write(tmp_path, 0, 3)
    write(tmp_path, 3, 2, {"checkpoint": "other"})
    expected = [record(episode)["accuracy"] for episode in range(10)]
    assert leading_accuracies(tmp_path, IDENTITY).tolist() == expected[:3]
    write(tmp_path, 3, 2)
    assert leading_accuracies(tmp_path, IDENTITY).tolist() == expected


def first_of(found: tuple[str, ...]) -> list[str]:
    """The problems without their remedies."""
    return [text.split(";")[0] for text in found]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        expected = f"{folder}: holds no record files; run `raymaml test` first"
        assert problems(folder) == (expected,)


def test_every_hole_and_every_overlap_is_named(tmp_path: Path) -> None:
    write(tmp_path / "holes", 2, 3)
    write(tmp_path / "holes", 6, 2)
    assert first_of(problems(tmp_path / "holes", num_episodes=10)) == [
        f"{tmp_path / 'holes'}: no record of episodes {hole}"
        for hole in ("0 to 1", "5 to 5", "8 to 9")
    ]
    assert len(read_records(tmp_path / "holes")) == 5  # no count was expected
    wide = write(tmp_path, 0, 10)
    inner = [write(tmp_path, 2, 3), write(tmp_path, 7, 5)]  # not all are neighbours
    assert first_of(problems(tmp_path)) == [
        f"{inner[0]}: episodes 2 to 4 are in {wide.name} too",
        f"{inner[1]}: episodes 7 to 9 are in {wide.name} too",
    ]


def test_all_files_that_do_not_fit_are_named_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    foreign = write(tmp_path, 2, 2, {"checkpoint": "bad", "episodes": "feed"})
    other = chunk_path(tmp_path, 4, 1)
    write_chunk(other, [record(4, num_steps=5)], IDENTITY)
    assert first_of(problems(tmp_path)) == [
        f"{foreign}: belongs to another campaign (checkpoint is bad, expected c0ffee)",
        f"{other}: has another number of inner steps or ways than the chunks beside it",
    ]
    with pytest.raises(UserError, match="episodes is feed, expected absent") as caught:
        read_records(tmp_path, identity={"checkpoint": "c0ffee"})
    assert len(caught.value.problems) == 3


def test_all_files_that_are_no_chunks_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 2)
    table = read_records(tmp_path)
    torn = write(tmp_path, 2, 2)
    torn.write_bytes(torn.read_bytes()[:-20])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    pq.write_table(table.append_column("y", [[1, 2]]), tmp_path / "more.parquet")
    pq.write_table(table.take([1, 0]), tmp_path / "shuffled.parquet")
    pq.write_table(table.drop(["support_labels", "query_labels"]), path)  # of the first version
    older, *others = problems(tmp_path)
    assert older.startswith(f"{path}: is of an older raymaml, which showed images in the order of")
    assert "sample again with `raymaml data sample`" in older
    assert first_of(tuple(others)) == [
        f"{torn}: is torn or no file of records",
        f"{tmp_path / 'foreign.parquet'}: is torn or no file of records",
        f"{tmp_path / 'more.parquet'}: has other columns than a file of records",
        f"{tmp_path / 'shuffled.parquet'}: its episodes are not consecutive",
    ]


def test_labels_that_no_episode_has_are_refused(tmp_path: Path) -> None:
    for labels in ((0, 1, 2, 3, 3), (0, 1, 2, 3, 5), (0, 0, 0, 0, 0)):
        chunk = chunk_path(tmp_path, 0, 1)
        write_chunk(chunk, [record(0) | {"support_labels": labels}], IDENTITY)
        assert first_of(problems(tmp_path)) == [f"{chunk}: has impossible values of support_labels"]


def test_records_of_before_have_no_predictions_and_stay_good(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 2)
    pq.write_table(pq.read_table(path).drop(["query_predictions"]), path)
    write(tmp_path, 2, 2)
    assert missing_chunks(tmp_path, 4, 3, IDENTITY) == []
    found = record_arrays(read_records(tmp_path, 4, IDENTITY)).query_predictions
    assert found.tolist() == [[-1] * 15] * 2 + [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3] * 2


def test_predictions_that_no_model_makes_are_refused(tmp_path: Path) -> None:
    for taken in ((5, *[0] * 14), (-2, *[0] * 14), (0,) * 14):
        chunk = chunk_path(tmp_path, 0, 1)
        write_chunk(chunk, [record(0) | {"query_predictions": taken}], IDENTITY)
        (problem,) = problems(tmp_path)
        assert problem.startswith(f"{chunk}: has impossible values of query_predictions")


def test_only_what_no_complete_chunk_holds_is_missing(tmp_path: Path) -> None:
    assert missing_chunks(tmp_path, 7, 3, IDENTITY) == [range(3), range(3, 6), range(6, 7)]
    write(tmp_path, 2, 2)
    write(tmp_path, 6, 6)
    torn = write(tmp_path, 13, 1)
    torn.write_bytes(b"PAR1")
    write(tmp_path, 14, 1, {"checkpoint": "another"})
    missing = missing_chunks(tmp_path, 16, 3, IDENTITY)
    # Held: 2, 3, 6..11. Holes: 0..1, 4..5, 12..15.
    assert missing == [range(2), range(4, 6), range(12, 15), range(15, 16)]
    assert missing_chunks(tmp_path, 4, 3, IDENTITY) == [range(2)]
    for other in (
        {},
        {"checkpoint": "c0ffee"},
        IDENTITY | {"more": "1"},
        IDENTITY | {"episodes": "b"},
    ):
        assert missing_chunks(tmp_path, 4, 3, other) == [range(3), range(3, 4)]


def test_a_campaign_goes_on_with_another_chunk_size(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    write(tmp_path, 8, 4)
    for chunk in missing_chunks(tmp_path, 20, 3, IDENTITY):
        write(tmp_path, chunk.start, len(chunk))
    assert not missing_chunks(tmp_path, 20, 5, IDENTITY)
    write(tmp_path / "at once", 0, 20)
    assert read_records(tmp_path, 20).equals(read_records(tmp_path / "at once", 20))


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    bad = [
        make_record(index, loss_by_step=(1.0, loss))
        for index, loss in enumerate((float("nan"), float("inf")))
    ]
    write_chunk(tmp_path / "bad.parquet", bad, IDENTITY)
    loss = record_arrays(read_records(tmp_path, 2)).loss
    assert np.isnan(loss[0])
    assert np.isposinf(loss[1])


@pytest.mark.parametrize(
    "error", [StorageError("s3://x: cannot be reached"), OSError(errno.EIO, "Input/output error")]
)
def test_a_chunk_that_cannot_be_read_now_is_not_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write(tmp_path, 0, 10)

    def refuse(_path: Path) -> bytes:
        raise error

    monkeypatch.setattr(record_files, "read_bytes", refuse)
    with pytest.raises(StorageError, match="cannot be"):
        missing_chunks(tmp_path, 10, 5, IDENTITY)
