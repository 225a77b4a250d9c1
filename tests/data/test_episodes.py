"""Sampling of episodes and the shards that keep them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_data import make_bank, spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from raymaml.data import episodes as module
from raymaml.data.bank import ImageBank
from raymaml.data.episodes import (
    EpisodeRows,
    EpisodeShards,
    check_shards,
    read_pixels,
    read_rows,
    sample_episode,
    write_shards,
)
from raymaml.types import UserError

COUNTS = {"train": [20] * 12, "val": [20] * 5, "test": [20] * 6}
RECORDED = [41, 2401375900870217655, [7, 10, 6], [143, 216, 129], [148, 140, 200, 213, 132, 121]]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    return make_bank(tmp_path_factory.mktemp("episodes") / "bank", COUNTS)


def as_lists(rows: EpisodeRows) -> list[object]:
    return [rows.index, rows.seed, *(a.tolist() for a in (rows.classes, rows.support, rows.query))]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_episode_is_what_the_word_says(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ways, shots, queries = (data.draw(st.integers(low, 6)) for low in (2, 1, 1))
    sizes = st.integers(shots + queries, 30)
    counts = data.draw(st.lists(sizes, min_size=ways, max_size=40))
    folder = tmp_path_factory.mktemp("any") / "bank"
    any_bank = make_bank(folder, {"train": [1, 2], "val": counts}, size=1)
    spec = spec_of(ways, shots, queries, 1)
    seed, index = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 10**9))
    rows = sample_episode(any_bank, spec, seed, "val", index)

    assert len(set(rows.classes.tolist())) == ways, "a class repeats"
    assert {any_bank.classes[c].split for c in rows.classes.tolist()} == {"val"}
    assert rows.support.shape == (ways * shots,)
    assert rows.query.shape == (ways * queries,)
    images = [*rows.support.tolist(), *rows.query.tolist()]
    assert len(set(images)) == len(images), "an image repeats"
    owners = np.searchsorted(any_bank.first_row, rows.support, side="right") - 1
    np.testing.assert_array_equal(owners, np.repeat(rows.classes, shots))
    owners = np.searchsorted(any_bank.first_row, rows.query, side="right") - 1
    np.testing.assert_array_equal(owners, np.repeat(rows.classes, queries))


def test_an_episode_has_these_very_rows_for_ever(bank: ImageBank) -> None:
    """Recorded once: a change of these numbers makes every published seed worthless."""
    rows = sample_episode(bank, spec_of(3, 1, 2, 1), 7, "train", 41)
    assert as_lists(rows) == RECORDED


def test_episodes_do_not_depend_on_history_or_process(bank: ImageBank) -> None:
    spec = spec_of(3, 2, 4, 1)
    here = [as_lists(sample_episode(bank, spec, 5, "test", index)) for index in (3, 0, 9)]
    program = (
        "import json, sys; from pathlib import Path\n"
        "from raymaml.config.schema import EpisodesConfig\n"
        "from raymaml.data.bank import ImageBank\n"
        "from raymaml.data.episodes import sample_episode\n"
        "bank = ImageBank.open(Path(sys.argv[1]))\n"
        "spec = EpisodesConfig(num_ways=3, num_shots=2, num_queries=4, num_episodes=1)\n"
        "for index in (9, 3, 0):\n"
        "    rows = sample_episode(bank, spec, 5, 'test', index)\n"
        "    print(json.dumps([rows.index, rows.seed, *(a.tolist() for a in"
        " (rows.classes, rows.support, rows.query))]))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", program, str(bank.folder)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    nine, three, zero = map(json.loads, there.stdout.splitlines())
    assert [three, zero, nine] == here


def test_seed_split_and_index_name_different_episodes(bank: ImageBank) -> None:
    spec = spec_of(5, 1, 15, 1)
    named = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    episodes = [sample_episode(bank, spec, *name) for name in named]
    assert len({episode.seed for episode in episodes}) == 4
    assert len({tuple(episode.query.tolist()) for episode in episodes}) == 4


def test_the_support_set_does_not_depend_on_the_number_of_queries(bank: ImageBank) -> None:
    few, many = (sample_episode(bank, spec_of(4, 3, q, 1), 0, "train", 8) for q in (1, 17))
    np.testing.assert_array_equal(few.classes, many.classes)
    np.testing.assert_array_equal(few.support, many.support)
    np.testing.assert_array_equal(few.query.reshape(4, 1), many.query.reshape(4, 17)[:, :1])


def test_classes_and_images_are_drawn_uniformly(bank: ImageBank) -> None:
    """Chi-square tests of 3,000 draws of 5 of 12 classes and of 5 of 20 images.

    A draw of n of m without replacement varies less than n independent draws, by the factor
    (m - n) / (m - 1); the statistic is scaled up by its inverse.
    """
    ways, drawn, episodes = 5, 5, 3000
    spec = spec_of(ways, 2, drawn - 2, 1)
    classes, images, first, support = np.zeros(12), np.zeros(20), np.zeros(12), np.zeros(20)
    for index in range(episodes):
        rows = sample_episode(bank, spec, 0, "train", index)
        classes += np.bincount(rows.classes, minlength=12)
        first += np.bincount(rows.classes[:1], minlength=12)
        support += np.bincount(rows.support % 20, minlength=20)
        images += np.bincount(np.concatenate([rows.support, rows.query]) % 20, minlength=20)

    assert classes.sum() == ways * episodes
    assert images.sum() == ways * drawn * episodes
    for counts, taken in ((classes, ways), (first, 1), (images, drawn), (support, 2)):
        kinds = len(counts)
        statistic = stats.chisquare(counts).statistic * (kinds - 1) / (kinds - taken)
        assert 0.001 < stats.chi2.sf(statistic, kinds - 1) < 0.999


@pytest.mark.parametrize("per_shard", [1, 7, 40])
def test_shards_keep_what_is_sampled_whatever_their_size(
    bank: ImageBank, tmp_path: Path, per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_BATCH", 3)
    spec = spec_of(5, 1, 15, 40)
    folder = tmp_path / "train"
    written = write_shards(
        bank, spec, seed=3, split="train", folder=folder, episodes_per_shard=per_shard
    )
    shards = EpisodeShards.open(folder)
    assert (shards.count, shards.spec, shards.bank_hash) == (40, spec, bank.hash)
    assert not shards.materialized
    assert len(shards.files) == -(-40 // per_shard)
    for index, rows in enumerate(written.rows(range(40))):
        assert as_lists(rows) == as_lists(sample_episode(bank, spec, 3, "train", index))
    scattered = [39, 0, 7, 7, 6, 8, 21, 22, 23]
    assert [rows.index for rows in shards.rows(scattered)] == scattered
    assert shards.rows([]) == []


def test_files_of_shards_stream_all_episodes_in_order(bank: ImageBank, tmp_path: Path) -> None:
    shards = write_shards(
        bank, spec_of(2, 1, 1, 10), seed=0, split="val", folder=tmp_path / "v", episodes_per_shard=4
    )
    assert [(first, count) for _, first, count in shards.files] == [(0, 4), (4, 4), (8, 2)]
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path, _, _ in shards.files]
    assert [rows.index for rows in read_rows(pa.concat_tables(tables))] == list(range(10))


@pytest.mark.parametrize("index", [-1, 10])
def test_an_episode_that_was_not_sampled_is_an_error(
    bank: ImageBank, tmp_path: Path, index: int
) -> None:
    shards = write_shards(bank, spec_of(2, 1, 1, 10), seed=0, split="val", folder=tmp_path / "v")
    with pytest.raises(IndexError, match=r"0\.\.9"):
        shards.rows([index])


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 5), (2, 1)])
def test_materialised_shards_hold_the_pixels(tmp_path: Path, channels: int, size: int) -> None:
    images = make_bank(tmp_path / "bank", {"train": [6] * 4}, size=size, channels=channels)
    shards = write_shards(
        images,
        spec_of(3, 2, 4, 20),
        seed=0,
        split="train",
        folder=tmp_path / "t",
        materialize=True,
        episodes_per_shard=18,
    )
    assert shards.materialized
    wanted = [0, 15, 16, 17, 18, 19, 2]
    support, query = shards.pixels(wanted)
    assert support.shape == (7, 6, size, size, channels)
    assert query.shape == (7, 12, size, size, channels)
    for at, rows in enumerate(shards.rows(wanted)):
        np.testing.assert_array_equal(support[at], images.images(rows.support))
        np.testing.assert_array_equal(query[at], images.images(rows.query))
    table = pa.concat_tables([shards.table([3]), shards.table([1, 2])])
    np.testing.assert_array_equal(read_pixels(table)[1], shards.pixels([3, 1, 2])[1])
    assert shards.pixels([])[0].shape == (0, 6, size, size, channels)


def three_shards(bank: ImageBank, folder: Path) -> EpisodeShards:
    return write_shards(
        bank, spec_of(2, 1, 1, 9), seed=0, split="val", folder=folder, episodes_per_shard=3
    )


def test_a_truncated_an_altered_and_a_missing_shard_are_refused_by_name(
    bank: ImageBank, tmp_path: Path
) -> None:
    three_shards(bank, tmp_path / "v")
    truncated, altered, missing = (tmp_path / "v" / f"shard-0000{i}.arrow" for i in range(3))
    truncated.write_bytes(truncated.read_bytes()[:-1])
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    missing.unlink()
    with pytest.raises(UserError) as caught:
        EpisodeShards.open(tmp_path / "v")
    assert len(caught.value.problems) == 3
    for problem, path, what in zip(
        caught.value.problems,
        (truncated, altered, missing),
        ("is truncated", "is altered", "is missing"),
        strict=True,
    ):
        assert problem.startswith(f"{path}: {what}")
        assert "raymaml data sample CONFIG" in problem


def test_a_process_may_skip_the_checksums_but_not_the_sizes(
    bank: ImageBank, tmp_path: Path
) -> None:
    three_shards(bank, tmp_path / "v")
    shard = tmp_path / "v" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert EpisodeShards.open(tmp_path / "v", verify=False).count == 9
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is truncated"):
        EpisodeShards.open(tmp_path / "v", verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there are no episode shards here"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema_version": 1}', "is damaged"),
        ('{"schema_version": 99}', "schema_version is 99"),
    ],
)
def test_a_bad_manifest_is_refused_by_name(
    bank: ImageBank, tmp_path: Path, content: str | None, message: str
) -> None:
    three_shards(bank, tmp_path / "v")
    manifest = tmp_path / "v" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(UserError, match=rf"manifest\.json: {message}.*raymaml data sample CONFIG"):
        EpisodeShards.open(tmp_path / "v")


def test_the_manifest_says_how_the_episodes_came_about(bank: ImageBank, tmp_path: Path) -> None:
    shards = three_shards(bank, tmp_path / "v")
    data = (tmp_path / "v" / "manifest.json").read_bytes()
    tree = json.loads(data)
    assert tree["spec"] == {"num_ways": 2, "num_shots": 1, "num_queries": 1, "num_episodes": 9}
    assert (tree["bank_hash"], tree["seed"], tree["split"]) == (bank.hash, 0, "val")
    assert (tree["schema_version"], tree["count"]) == (1, 9)
    first = hashlib.sha256((tmp_path / "v" / "shard-00000.arrow").read_bytes()).hexdigest()
    assert tree["shards"][0]["sha256"] == first
    assert shards.manifest_hash == hashlib.sha256(data).hexdigest()


def test_all_that_differs_from_the_config_is_named(bank: ImageBank, tmp_path: Path) -> None:
    shards = three_shards(bank, tmp_path / "v")
    check_shards(shards, bank, shards.spec, 0, "val")
    other_bank = make_bank(tmp_path / "bank", COUNTS, seed=1)
    with pytest.raises(UserError) as caught:
        check_shards(shards, other_bank, spec_of(2, 4, 1, 8), 5, "test", materialize=True)
    named = [problem.split(": ")[1].split(" is ")[0] for problem in caught.value.problems]
    assert named == [
        *("bank_hash", "seed", "split", "spec.num_shots", "spec.num_episodes", "materialized"),
    ]
    assert "spec.num_shots is 1, config and bank ask for 4" in str(caught.value)


def test_equal_shards_are_reused_and_others_never_overwritten(
    bank: ImageBank, tmp_path: Path
) -> None:
    three_shards(bank, tmp_path / "v")
    before = (tmp_path / "v" / "manifest.json").stat()
    three_shards(bank, tmp_path / "v")
    with pytest.raises(UserError, match=r"seed is 0, config and bank ask for 1"):
        write_shards(bank, spec_of(2, 1, 1, 9), seed=1, split="val", folder=tmp_path / "v")
    after = (tmp_path / "v" / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_damaged_shards_are_not_reused(bank: ImageBank, tmp_path: Path) -> None:
    three_shards(bank, tmp_path / "v")
    (tmp_path / "v" / "shard-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow: is missing"):
        three_shards(bank, tmp_path / "v")


def test_nothing_remains_of_an_interrupted_sampling(
    bank: ImageBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_5(*arguments: object) -> EpisodeRows:
        if arguments[-1] == 5:
            raise KeyboardInterrupt
        return sample_episode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "sample_episode", stop_at_5)
    with pytest.raises(KeyboardInterrupt):
        three_shards(bank, tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_two_samplers_at_once_agree_on_one_folder(
    bank: ImageBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process finishes while this one still writes."""

    def sampled_elsewhere(*arguments: object) -> EpisodeRows:
        monkeypatch.setattr(module, "sample_episode", sample_episode)
        three_shards(bank, tmp_path / "v")
        return sample_episode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "sample_episode", sampled_elsewhere)
    assert three_shards(bank, tmp_path / "v").count == 9
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_episodes_that_the_bank_cannot_give_are_refused_with_all_reasons(tmp_path: Path) -> None:
    small = make_bank(tmp_path / "bank", {"train": [20, 3, 15]})
    with pytest.raises(UserError) as caught:
        write_shards(small, spec_of(5, 1, 15, 9), seed=0, split="train", folder=tmp_path / "t")
    classes, second, third = caught.value.problems
    assert classes.startswith("split train: has 3 classes, episodes.train.num_ways is 5")
    assert second.startswith("class train-1 of split train: has 3 images")
    assert "num_shots + num_queries = 16" in third
    assert not (tmp_path / "t").exists()


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    small = make_bank(tmp_path / "bank", {"train": [2] * 60}, size=1)
    with pytest.raises(UserError) as caught:
        write_shards(small, spec_of(5, 1, 15, 9), seed=0, split="train", folder=tmp_path / "t")
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1] == "... and 10 more problems like these"
