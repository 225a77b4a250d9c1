"""The exported network gives the classifier's probabilities, in any batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_classify import classifier, images
from numpy.typing import NDArray

from raymaml.classify import export
from raymaml.common.errors import UserError
from tests.conftest import MakeConfig


def run_onnx(path: Path, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[str]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    classes = session.get_modelmeta().custom_metadata_map["classes"]
    return session.run(["probabilities"], {"pixels": pixels})[0], json.loads(classes)


def run_pt2(path: Path, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[str]]:
    extra = {"classes.json": ""}
    network = torch.export.load(path, extra_files=extra).module()
    return network(torch.from_numpy(pixels)).numpy(), json.loads(extra["classes.json"])


@pytest.mark.parametrize(
    "norm",
    [
        "context",
        "episodic",
        "tasknorm_i",
        "none",
        "{policy: running, per_step: both, scale: false}",
    ],
)
@pytest.mark.parametrize(("name", "run"), [("model.onnx", run_onnx), ("model.pt2", run_pt2)])
def test_a_network_gives_the_same_probabilities(
    make_config: MakeConfig, tmp_path: Path, norm: str, name: str, run: object
) -> None:
    pytest.importorskip("onnxscript")
    found = classifier(make_config, f"model.norm={norm}", "inner.lr=0.5").fit(*images((1, 2)))
    queries, _ = images((8, 8))
    found.export(tmp_path / name)
    assert callable(run)
    for count in (1, 2, 16):
        probabilities, classes = run(tmp_path / name, queries[:count])
        wanted = found.predict_proba(queries[:count])
        assert np.abs(probabilities - wanted).max() < 1e-5
        assert classes == ["a", "b"]
    assert np.ptp(wanted[:, 0]) > 0.05  # so that the comparison says something


def test_a_loaded_classifier_is_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    found = classifier(make_config).fit(*images((1, 2)))
    found.save(tmp_path / "saved")
    type(found).load(tmp_path / "saved").export(tmp_path / "model.pt2")
    queries, _ = images((3,))
    probabilities, _ = run_pt2(tmp_path / "model.pt2", queries)
    assert np.abs(probabilities - found.predict_proba(queries)).max() < 1e-5


def test_what_cannot_be_exported(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = classifier(make_config)
    with pytest.raises(UserError, match="call fit first"):
        found.export(tmp_path / "model.pt2")
    found.fit(*images((1, 2)))
    with pytest.raises(UserError, match=r"model\.h5 is neither \.onnx nor \.pt2"):
        found.export(tmp_path / "model.h5")
    (tmp_path / "there.pt2").write_text("")
    with pytest.raises(UserError, match=r"there\.pt2 exists"):
        found.export(tmp_path / "there.pt2")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="probabilities differ by"):
        found.export(tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
    other = classifier(make_config, "model.norm=transductive").fit(*images((1, 2)))
    with pytest.raises(UserError, match="norm is transductive"):
        other.export(tmp_path / "model.pt2")


def test_without_onnx_a_message_names_the_extra(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed; pip install raymaml\[onnx"):
        classifier(make_config).fit(*images((1, 2))).export(tmp_path / "model.onnx")
