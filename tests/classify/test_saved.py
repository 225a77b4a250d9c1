"""A saved classifier: enough by itself, whole or absent, and nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_classify import classifier, images
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from raymaml import FewShotClassifier
from raymaml.common.errors import UserError
from tests.conftest import MakeConfig


@pytest.mark.parametrize("norm", ["context", "episodic", "running", "tasknorm_reference"])
@pytest.mark.parametrize("head", ["zero", "learned", "shared"])
def test_it_answers_as_before_and_adapts_as_before(
    make_config: MakeConfig, tmp_path: Path, norm: str, head: str
) -> None:
    before = classifier(make_config, f"model.norm={norm}", f"model.head={head}")
    queries, _ = images((2, 2, 2), first=4)
    wanted = before.fit(*images((1, 2, 3))).predict_proba(queries)
    before.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "tiny")  # the run, its shards
    after = FewShotClassifier.load(str(tmp_path / "saved"))
    assert_array_equal(after.predict_proba(queries), wanted)
    assert_array_equal(after.predict(queries), before.predict(queries))
    with pytest.raises(UserError, match="holds no support images; call fit"):
        after.leave_one_out()
    assert_array_equal(after.fit(*images((1, 2, 3))).predict_proba(queries), wanted)


@pytest.mark.parametrize("labels", [[1, 2], [True, False], [0.0, 7.0], ["x", "ü"], [2**62, -3]])
@pytest.mark.parametrize("kind", [None, object])
def test_labels_come_back(
    make_config: MakeConfig, tmp_path: Path, labels: list[Any], kind: type | None
) -> None:
    found = classifier(make_config).fit(images((1, 1))[0], np.array(labels, dtype=kind))
    if kind and not isinstance(labels[0], str):
        with pytest.raises(UserError, match="the labels are of type object"):
            found.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        return
    found.save(tmp_path / "saved")
    back = FewShotClassifier.load(tmp_path / "saved").classes_
    assert back.dtype == found.classes_.dtype
    assert_array_equal(back, found.classes_)


def test_the_card_names_classes_protocol_and_origin(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    classifier(make_config).fit(*images((1, 3))).save(tmp_path / "saved")
    text = (tmp_path / "saved" / "classifier.json").read_text()
    card = json.loads(text)
    assert card["protocol"] == "2-way 1 to 3-shot | context | 2 steps | head zero"
    assert (card["classes"], card["shots"], card["origin"]) == (["a", "b"], [1, 3], "0" * 64)
    assert str(tmp_path) not in text  # no place of this machine


def test_what_exists_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    found = classifier(make_config)
    with pytest.raises(UserError, match="call fit first"):
        found.save(tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    with pytest.raises(UserError, match="saved exists; give another folder"):
        found.fit(*images((1, 1))).save(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_an_encoder_of_ones_own_needs_its_code(make_config: MakeConfig, tmp_path: Path) -> None:
    own = ("model.encoder=helpers_encoders:Plain", "model.width=null", "model.norm=none")
    found = classifier(make_config, *own).fit(*images((1, 1)))
    with pytest.raises(UserError, match="whose code a folder does not hold"):
        found.save(tmp_path / "saved")


@pytest.fixture
def saved(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A saved classifier of two classes."""
    folder = tmp_path / "saved"
    classifier(make_config).fit(*images((1, 1))).save(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        FewShotClassifier.load(folder)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"classes": ["a"]}, "classes"),
        ({"classes": ["a", "a"]}, "classes: they are not different labels"),
        ({"classes": ["a", 2]}, "classes: they are not different labels"),
        ({"label_type": "int8"}, "classes: invalid literal"),
        ({"label_type": "U900000000"}, "label_type"),
        ({"classes": [1, 300], "label_type": "uint8"}, "classes: "),
        ({"shots": [1]}, "its shots and files"),
        ({"files": {}}, "its shots and files"),
        (
            {
                "config.model.encoder": "timm:resnet18",
                "config.model.encoder_args": {"checkpoint_path": "/etc/passwd"},
                "config.model.width": None,
            },
            "model: model.encoder_args: checkpoint_path",
        ),
        (
            {"config.model.encoder": "os:system", "config.model.width": None},
            "model.encoder is os:s",
        ),
        ({"config.model.norm": "magic"}, "model.norm"),
        ({"config.model.head": "learned"}, "it has 2 classes, and the head 3 rows"),
    ],
)
def test_a_card_that_was_changed(saved: Path, change: dict[str, Any], reason: str) -> None:
    path = saved / "classifier.json"
    card = json.loads(path.read_text())
    for name, value in change.items():
        *sections, key = name.split(".")
        target = card
        for section in sections:
            target = target[section]
        target[key] = value
    path.write_text(json.dumps(card))
    message = refused(saved)
    assert message.startswith(f"{path}: is damaged ({reason}")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["theta.safetensors", "adapted.safetensors"])
def test_weights_that_were_changed(saved: Path, name: str) -> None:
    path = saved / name
    whole, card = path.read_bytes(), json.loads((saved / "classifier.json").read_text())

    def refused_with(content: bytes) -> str:
        path.write_bytes(content)
        card["files"][name] = hashlib.sha256(content).hexdigest()
        (saved / "classifier.json").write_text(json.dumps(card))
        return refused(saved)

    path.write_bytes(whole[:-1])
    assert "its sha256 is not the one in classifier.json" in refused(saved)
    assert "safetensors cannot read it" in refused_with(whole[:-1])
    tensors = load_file(_written(saved, name, whole))
    first = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != first}, path)
    assert "its tensors are not those of the model" in refused_with(path.read_bytes())
    save_file(tensors | {first: np.zeros((1, 2, 3), dtype=np.float32)}, path)
    assert "has the shape [1, 2, 3]" in refused_with(path.read_bytes())
    path.unlink()
    assert f"{path}: is damaged" in refused(saved)


def _written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_a_folder_of_something_else(saved: Path) -> None:
    (saved / "classifier.json").write_text("[]")
    assert "classifier.json: is damaged" in refused(saved)
    (saved / "classifier.json").unlink()
    assert "holds no checkpoint" in refused(saved)
