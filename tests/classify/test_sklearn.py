"""The contract of scikit-learn's estimators, by scikit-learn's own checks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_classify import classifier, images
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from raymaml import FewShotClassifier
from raymaml.common.errors import UserError
from tests.conftest import MakeConfig

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402
from sklearn.utils import estimator_checks, validation  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402

OF_ANY_INPUT = [
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
]
"""Checks that give an estimator no data. All others give vectors."""


class OnVectors(FewShotClassifier):
    """Draws vectors as images, so that scikit-learn's checks can give it data."""

    def fit(self, X: Any, y: Any) -> OnVectors:  # noqa: N803  (as scikit-learn calls them)
        vectors, labels = validation.validate_data(self, X, y)
        check_classification_targets(labels)
        super().fit(drawn(vectors), labels)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        validation.check_is_fitted(self)
        return super().predict_proba(drawn(validation.validate_data(self, X, reset=False)))

    def score(self, X: Any, y: Any) -> float:  # noqa: N803
        return super().score(X, y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def drawn(vectors: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw vectors, [n, d], as images, [n, 16, 16]: a run of pixels as bright as each entry."""
    pixels = vectors[:, np.arange(256) * vectors.shape[1] // 256].reshape(-1, 16, 16)
    return (127.5 + 127.5 * np.tanh(pixels / 4)).astype(np.uint8)


@pytest.fixture
def saved(make_config: MakeConfig, tmp_path: Path) -> str:
    """The folder of a saved classifier of two classes."""
    inner = ("model.width=8", "inner.num_steps=10", "inner.lr=0.5")
    classifier(make_config, *inner).fit(*images((1, 1))).save(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("name", OF_ANY_INPUT)
def test_a_check_without_data(saved: str, name: str) -> None:
    getattr(estimator_checks, name)("FewShotClassifier", FewShotClassifier(saved))


@pytest.mark.filterwarnings("ignore:Estimator OnVectors does not inherit:UserWarning")
def test_the_checks_with_data(saved: str) -> None:
    outcomes = estimator_checks.check_estimator(OnVectors(saved), on_skip=None, on_fail=None)
    failed = {each["check_name"]: each["exception"] for each in outcomes
              if each["status"] == "failed"}  # fmt: skip
    assert not failed
    assert sum(each["status"] == "passed" for each in outcomes) > 30


def test_cross_validation_of_pictures(saved: str, tmp_path: Path) -> None:
    pixels, labels = images((6, 6, 6))
    scores = cross_val_score(FewShotClassifier(saved), pixels, labels, cv=3, error_score="raise")
    by_hand = []
    for fold in range(3):
        inside = np.arange(18) % 6 // 2 == fold  # two of each class, in order
        found = FewShotClassifier(saved).fit(pixels[~inside], labels[~inside])
        by_hand.append(found.score(pixels[inside], labels[inside]))
    assert_array_equal(scores, by_hand)


def test_a_clone_knows_the_model_and_not_the_classes(saved: str) -> None:
    found = FewShotClassifier.load(saved, group=7)
    other = clone(found)
    assert other.get_params() == found.get_params() == {
        "model": saved, "which": None, "device": None, "group": 7,
    }  # fmt: skip
    with pytest.raises(NotFittedError, match="call fit first") as caught:
        other.predict(images((1,))[0])
    assert isinstance(caught.value, UserError)
    assert repr(other) == f"FewShotClassifier(model={saved!r}, group=7)"
    with pytest.raises(ValueError, match=r"has no parameter modell; it has model, .*; did"):
        other.set_params(modell="x")


def test_a_fitted_classifier_is_pickled(saved: str) -> None:
    found = FewShotClassifier(saved).fit(*images((2, 2)))
    queries, _ = images((1, 1), first=4)
    again = pickle.loads(pickle.dumps(found))
    assert_array_equal(again.predict_proba(queries), found.predict_proba(queries))


def test_another_model_counts_from_the_next_fit_on(saved: str, make_config: MakeConfig) -> None:
    found, queries = FewShotClassifier(saved).fit(*images((2, 2))), images((1, 1), first=4)[0]
    before = found.predict_proba(queries)
    found.set_params(model=classifier(make_config).model)
    assert_array_equal(found.predict_proba(queries), before)
    assert np.abs(found.fit(*images((2, 2))).predict_proba(queries) - before).max() > 1e-3
