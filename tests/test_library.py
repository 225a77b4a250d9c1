"""The commands as functions: `raymaml.train`, `test`, `report` and `episodes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import raymaml
from raymaml.cli import main
from raymaml.training.data import open_training_data
from raymaml.types import tensors_of

CPU = torch.device("cpu")


def test_train_test_and_report_do_what_the_commands_do(make_config: Any) -> None:
    mine, theirs = make_config("a"), make_config("b")
    lines: list[str] = []
    trained = raymaml.train(mine, local=True, echo=lines.append)
    outcomes = [
        CliRunner().invoke(main, [*words, str(theirs.run_dir.parent / "config.yaml")])
        for words in (["train", "--local"], ["test", "--local"])
    ]
    assert [each.exit_code for each in outcomes] == [0, 0]
    assert (trained.folder, trained.step, trained.done) == (mine.run_folder, 6, True)
    assert trained.best is not None
    assert f"{100 * trained.best.accuracy:.2f}" in lines[-1]
    assert trained.validation is not None
    assert trained.validation.step == 6
    weights = [
        (config.run_folder / "checkpoint_00000006" / "params.safetensors").read_bytes()
        for config in (mine, theirs)
    ]
    assert weights[0] == weights[1]

    tested = raymaml.test(mine, local=True)
    assert [arm.name for arm in tested.arms] == ["model", "untrained", "no-adaptation"]
    assert len(tested.arms[0].records) == tested.summary["num_episodes"] == 10
    assert tested.path == mine.run_folder / "test" / "summary.json"
    number, _, rest = tested.headline.partition(" accuracy")
    assert number in outcomes[1].output
    assert str(tested.page) in rest
    before = tested.path.read_bytes()
    tested.page.unlink()
    assert raymaml.report(mine).page.is_file()
    assert tested.path.read_bytes() == before


def test_a_config_is_an_object_or_a_file_and_takes_overrides(make_config: Any) -> None:
    config = make_config("a")
    path = str(config.run_dir.parent / "config.yaml")
    for given in (config, path):
        result = raymaml.train(given, overrides=["outer.num_steps=3", "name=other"], local=True)
        assert (result.folder, result.step) == (config.run_dir / "other", 3)
    with pytest.raises(raymaml.UserError) as caught:
        raymaml.train(config, overrides=["outer.lr=x", "outer.nothing=1"], local=True)
    assert len(caught.value.problems) == 2
    assert "command line: outer.lr is 'x'" in caught.value.problems[0]


def test_episodes_are_those_of_training_and_go_on_at_any_number(make_config: Any) -> None:
    config = make_config("a", "data.augment.train.query=crop")
    data = open_training_data(config, CPU)
    found = raymaml.episodes(config, "train", batch_size=3, start=data.first_episode)
    for batch, step in zip(found, range(2), strict=False):
        wanted = data.train.load(data.indices(step, 0, 1))
        assert len(batch) == 3
        for name, value in tensors_of(wanted).items():
            assert torch.equal(getattr(batch, name), value)
    # 24 episodes: from number 17 on there are 7 left, in batches of 4 and 3
    rest = raymaml.episodes(config, "train", batch_size=4, start=17)
    assert (len(rest), [len(batch) for batch in rest]) == (2, [4, 3])
    whole = [*raymaml.episodes(config, "train")]
    assert len(whole) == 24
    assert torch.equal(next(iter(rest)).query_x[0], whole[17].query_x[0])
    # 24 + 17: the second round, which has the same support sets and other changes of the queries
    again = raymaml.episodes(config, "train", batch_size=4, start=24 + 17)
    assert len(again) == 2
    assert torch.equal(next(iter(again)).support_x[0], whole[17].support_x[0])
    assert not torch.equal(next(iter(again)).query_x[0], whole[17].query_x[0])


def test_episodes_that_are_not_sampled_are_a_users_error(make_config: Any) -> None:
    config = make_config("a")
    with pytest.raises(raymaml.UserError, match="nowhere"):
        raymaml.episodes(config, "test", overrides=[f"data.shards={Path('nowhere')}"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        raymaml.episodes(config, "test", batch_size=0)
