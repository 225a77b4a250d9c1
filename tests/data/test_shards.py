"""Shards: samples are kept, found again, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_data import as_lists, make_bank, spec_of

from raymaml.common.errors import UserError
from raymaml.data import shards as module
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows, listed, sample_episode
from raymaml.data.shard_format import read_pixels
from raymaml.data.shards import EpisodeShards, Sampling

COUNTS = {"train": [20] * 12, "val": [20] * 5, "test": [20] * 6}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    return make_bank(tmp_path_factory.mktemp("episodes") / "bank", COUNTS)


@pytest.mark.parametrize("per_shard", [1, 7, 40])
def test_shards_keep_what_is_sampled_whatever_their_size(
    bank: ImageBank, tmp_path: Path, per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", (20_000, 3))
    spec = spec_of(5, 1, 15, 40)
    folder = tmp_path / "train"
    written = Sampling(bank, spec, seed=3, split="train", folder=folder).write(per_shard)
    shards = EpisodeShards.open(folder)
    assert (shards.count, shards.spec, shards.manifest.bank_hash) == (40, spec, bank.hash)
    assert not shards.materialized
    assert len(shards.files) == -(-40 // per_shard)
    for index, rows in enumerate(written.rows(range(40))):
        assert as_lists(rows) == as_lists(sample_episode(bank, spec, 3, "train", index))
    scattered = [39, 0, 7, 7, 6, 8, 21, 22, 23]
    assert [rows.index for rows in shards.rows(scattered)] == scattered
    assert shards.rows([]) == []
    for index in (-1, 40):
        with pytest.raises(IndexError, match=r"0\.\.39"):
            shards.rows([index])


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 5), (2, 1)])
def test_materialised_shards_hold_the_pixels(tmp_path: Path, channels: int, size: int) -> None:
    images = make_bank(tmp_path / "bank", {"train": [6] * 4}, size=size, channels=channels)
    shards = Sampling(
        images, spec_of(3, 2, 4, 20), seed=0, split="train", folder=tmp_path / "t", materialize=True
    ).write(18)
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
    return Sampling(bank, spec_of(2, 1, 1, 9), seed=0, split="val", folder=folder).write(3)


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
    for problem, path, damage in zip(
        caught.value.problems,
        (truncated, altered, missing),
        ("is truncated", "is altered", "is missing"),
        strict=True,
    ):
        assert problem.startswith(f"{path}: {damage}")
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
        ("[]", "schema_version is None"),
        ('{"schema_version": 1}', "schema_version is 1, this program reads 2; remove the folder"),
        ('{"schema_version": 2}', "is damaged"),
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
    assert (tree["schema_version"], tree["count"]) == (2, 9)
    first = hashlib.sha256((tmp_path / "v" / "shard-00000.arrow").read_bytes()).hexdigest()
    assert tree["shards"][0]["sha256"] == first
    assert shards.manifest_hash == hashlib.sha256(data).hexdigest()


def test_all_that_differs_from_the_config_is_named(bank: ImageBank, tmp_path: Path) -> None:
    shards = three_shards(bank, tmp_path / "v")
    Sampling(bank, shards.spec, seed=0, split="val", folder=shards.place).require(shards)
    other_bank = make_bank(tmp_path / "bank", COUNTS, seed=1)
    with pytest.raises(UserError) as caught:
        Sampling(
            other_bank,
            spec_of(2, 4, 1, 99),
            seed=5,
            split="test",
            folder=shards.place,
            materialize=True,
        ).require(shards, same_form=True)
    named = [problem.split(": ")[1].split(" is ")[0] for problem in caught.value.problems]
    assert named == [
        *(
            "bank_hash",
            "episodes.seed",
            "split",
            "spec.num_shots",
            "spec.num_episodes",
            "materialized",
        ),
    ]
    assert "spec.num_shots is 1, config and bank ask for 4" in str(caught.value)


def test_equal_shards_are_reused_and_others_never_overwritten(
    bank: ImageBank, tmp_path: Path
) -> None:
    three_shards(bank, tmp_path / "v")
    before = (tmp_path / "v" / "manifest.json").stat()
    three_shards(bank, tmp_path / "v")
    with pytest.raises(UserError, match=r"episodes.seed is 0, config and bank ask for 1"):
        Sampling(bank, spec_of(2, 1, 1, 9), seed=1, split="val", folder=tmp_path / "v").write()
    after = (tmp_path / "v" / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


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
        Sampling(small, spec_of(5, 1, 15, 9), seed=0, split="train", folder=tmp_path / "t").write()
    classes, images = caught.value.problems
    assert classes.startswith("split train: has 3 classes, episodes.train.num_ways is 5")
    assert images.startswith("split train: 2 of 3 classes have fewer images than num_shots +")
    assert "num_queries = 16 of episodes.train; the fewest are 3, of class train-1" in images
    assert not (tmp_path / "t").exists()


def test_a_long_list_of_problems_is_cut() -> None:
    problems = listed([f"class {number} is broken" for number in range(60)])
    assert len(problems) == 51
    assert problems[-1] == "... and 10 more problems like these"
