"""``FewShotClassifier``: any images, any labels, the same numbers as the learner."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_classify import PREPROCESSING, classifier, images
from numpy.testing import assert_array_equal
from PIL import Image

import raymaml
from raymaml.classify import adaptation
from raymaml.classify.adaptation import BATCH
from raymaml.classify.adapted import adapted, fold_logits, query_logits
from raymaml.common.errors import UserError
from raymaml.training.worker import train_locally
from raymaml.types import EpisodeBatch
from tests.conftest import MakeConfig

NORMS = ("context", "episodic", "running", "tasknorm_i", "tasknorm_reference", "instance", "none")


def test_a_run_classifies_new_classes(make_config: MakeConfig, tmp_path: Path) -> None:
    inner = ("inner.num_steps=10", "inner.lr=0.5", "model.width=16", "outer.num_steps=2")
    config = make_config("run", "model.norm=context", "model.head=zero", *inner)
    train_locally(config, lambda _line: None)
    support, labels = images((2, 2, 2, 2))
    found = raymaml.FewShotClassifier.load(config).fit(support, labels)
    queries, truth = images((4, 4, 4, 4), first=2)
    assert found.score(queries, truth) >= 0.75  # by chance 4 of 16
    assert list(found.classes_) == ["a", "b", "c", "d"]
    assert found.trained.config == config
    again = raymaml.FewShotClassifier.load(str(config.run_folder)).fit(support, labels)
    assert_array_equal(again.predict_proba(queries), found.predict_proba(queries))
    by_file = raymaml.FewShotClassifier.load(tmp_path / "run" / "config.yaml", which="last")
    assert by_file.fit(support, labels).trained.checkpoint == "checkpoint_00000002"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", ["zero", "learned", "shared"])
def test_the_numbers_are_those_of_the_learner(
    make_config: MakeConfig, norm: str, head: str
) -> None:
    found = classifier(make_config, f"model.norm={norm}", f"model.head={head}")
    support, labels = images((2, 2, 2))
    queries, _ = images((8, 8, 0))  # BATCH of them, so that no batch is filled up
    assert len(queries) == BATCH
    numbers = np.searchsorted(["a", "b", "c"], labels)
    episodes = EpisodeBatch(
        support_x=PREPROCESSING.tensor(support)[None],
        support_y=torch.from_numpy(numbers)[None],
        query_x=PREPROCESSING.tensor(queries)[None],
        query_y=torch.zeros(1, len(queries), dtype=torch.int64),
    )
    wanted = found.trained.learner.predict(episodes)[0].double().softmax(1).numpy()
    assert_array_equal(found.fit(support, labels).predict_proba(queries), wanted)


@pytest.mark.parametrize("norm", NORMS)
def test_an_answer_has_the_same_bits_in_any_call(make_config: MakeConfig, norm: str) -> None:
    found = classifier(make_config, f"model.norm={norm}").fit(*images((1, 2, 3)))
    queries, _ = images((8, 8, 5))
    whole = found.predict_proba(queries)
    for size in (1, 3, 20):
        parts = [found.predict_proba(queries[at : at + size]) for at in range(0, 21, size)]
        assert_array_equal(np.concatenate(parts), whole)
    assert found.predict_proba(queries[:0]).shape == (0, 3)


def test_a_transductive_model_judges_groups_in_order_and_warns(make_config: MakeConfig) -> None:
    found = classifier(make_config, "model.norm=transductive").fit(*images((2, 2)))
    queries, _ = images((5, 5))
    with pytest.warns(UserWarning, match="here all images given"):
        together = found.predict_proba(queries)
    with pytest.warns(UserWarning, match="here up to 4 images, in the given order"):
        grouped = found.set_params(group=4).predict_proba(queries)
    assert np.abs(grouped - together).max() > 1e-3
    assert_array_equal(grouped, np.concatenate([
        found.set_params(group=None).probabilities(queries[at : at + 4]) for at in (0, 4, 8)
    ]))  # fmt: skip
    with pytest.raises(UserError, match="group: is 0; give at least 1"):
        found.set_params(group=0).probabilities(queries)
    assert not classifier(make_config).caution


def test_every_kind_of_image_is_the_same_image(make_config: MakeConfig, tmp_path: Path) -> None:
    pixels, labels = images((2, 1))
    pictures = [Image.fromarray(each[..., 0]) for each in pixels]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    kinds: list[Any] = [
        pixels,
        list(pixels),
        pixels[..., 0],
        torch.from_numpy(pixels).movedim(-1, 1),
        pixels / 255,
        pictures,
        paths,
        list(map(str, paths)),
        np.array(list(map(str, paths))),
        [path.read_bytes() for path in paths],
        [path.as_uri() for path in paths],
    ]
    found = classifier(make_config)
    wanted = found.fit(pixels, labels).predict_proba(pixels)
    for kind in kinds:
        assert_array_equal(found.fit(kind, labels).predict_proba(kind), wanted)


@pytest.mark.parametrize(
    "labels",
    [["x", "x", "y"], [7, 7, -1], [True, True, False], [2.0, 2.0, 9.0], torch.tensor([4, 4, 1]),
     np.array(["x", "x", "y"], dtype=object)],
)  # fmt: skip
def test_any_labels(make_config: MakeConfig, labels: Any) -> None:
    pixels, _ = images((2, 1))
    found = classifier(make_config).fit(pixels, labels)
    values = np.asarray(labels)
    assert_array_equal(found.classes_, np.unique(values))
    assert found.predict(pixels).dtype == found.classes_.dtype == values.dtype
    assert found.score(pixels, labels) in {0, 1 / 3, 2 / 3, 1}


@pytest.mark.parametrize("norm", ["context", "transductive"])
def test_classes_weigh_the_same_however_many_images_they_have(
    make_config: MakeConfig, norm: str
) -> None:
    """At a head of zeros each of three classes has 1/3: one step leaves the biases where they are.

    A mean over images would move them by lr * (n / 6 - 1/3), for n = 3, 2, 1.
    """
    found = classifier(make_config, f"model.norm={norm}", "inner.num_steps=1", "inner.head_lr=1")
    adapted_to = found.fit(*images((3, 2, 1)))._fitted().fast.params
    assert adapted_to["head.bias"].abs().max() < 1e-6
    assert adapted_to["head.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["context", "transductive"])
def test_leave_one_out_adapts_to_the_others(make_config: MakeConfig, norm: str) -> None:
    """A transductive model judges the image among the others, any other model alone."""
    found = classifier(make_config, f"model.norm={norm}", "seed=4")  # alone, none is right
    pixels, labels = images((3, 2, 2))
    right = 0
    for left_out in range(7):
        others = [index for index in range(7) if index != left_out]
        found.fit(pixels[others], labels[others])
        if norm == "transductive":
            with pytest.warns(UserWarning, match="transductive"):
                answer = found.predict(pixels)[left_out]
        else:
            (answer,) = found.predict(pixels[[left_out]])
        right += int(answer == labels[left_out])
    accuracy, interval, folds = found.fit(pixels, labels).leave_one_out()
    assert (accuracy, folds) == (right / 7, 7)
    assert 0 <= interval.low <= accuracy <= interval.high <= 1
    assert found.fit(*images((3, 1))).leave_one_out() is None


@pytest.mark.parametrize("norm", [*NORMS, "transductive"])
@pytest.mark.parametrize(("head", "shots"), [("zero", (3, 2, 2)), ("prototypes", (2, 2, 2))])
def test_images_left_out_at_once_and_one_by_one(
    make_config: MakeConfig, norm: str, head: str, shots: tuple[int, ...]
) -> None:
    """Without the first of 3, 2, 2 images the classes are even; without any other they are not."""
    found = classifier(make_config, f"model.norm={norm}", f"model.head={head}")
    learner = found.trained.learner.double()
    pixels, labels = images(shots)
    x, count = PREPROCESSING.tensor(pixels).double(), len(labels)
    y = torch.from_numpy(np.searchsorted(["a", "b", "c"], labels))
    together = fold_logits(learner, x, y, torch.arange(count), among=norm == "transductive")
    for row, logits in enumerate(together):
        others = [index for index in range(count) if index != row]
        asked, place = (x, row) if norm == "transductive" else (x[[row]], 0)
        fast = adapted(learner, x[others], y[others])
        torch.testing.assert_close(logits, query_logits(learner, fast, asked)[place])


def test_a_gpu_leaves_as_many_out_at_once_as_the_config_says(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(*given: Any, **more: Any) -> torch.Tensor:
        seen.append(len(given[3]))
        return fold_logits(*given, **more)

    monkeypatch.setattr(adaptation, "fold_logits", counted)
    pixels, labels = images((3, 2, 2))
    alone = classifier(make_config).fit(pixels, labels).leave_one_out()
    three = classifier(make_config, "cluster.episodes_per_chunk=3").fit(pixels, labels)
    assert three.leave_one_out() == alone
    assert seen == [1] * 7 + [3, 3, 1]


def test_logits_of_an_image_left_out_that_are_not_finite_are_named(make_config: MakeConfig) -> None:
    found = classifier(make_config).fit(*images((2, 2)))
    with torch.no_grad():
        next(found.trained.learner.model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=r"^evaluation.inner: logits of a left-out image are not"):
        found.leave_one_out()


def test_of_many_images_some_are_left_out(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = classifier(make_config, "inner.num_steps=0").fit(*images((8, 8, 8)))
    monkeypatch.setattr(adaptation, "MOST_FOLDS", 5)
    outcome = found.leave_one_out(seed=1)
    assert outcome is not None
    assert outcome.folds == 5
    assert found.leave_one_out(seed=1) == outcome


@pytest.mark.parametrize(
    ("overrides", "given", "labels", "message"),
    [
        ((), 2, ["a"], "labels: are of shape [1], for 2 images"),
        ((), 2, ["a", "a"], "labels: hold one class, 'a'"),
        ((), 2, [0.5, 1], "labels: Unknown label type: float64"),
        ((), 2, [math.nan, 1], "labels: Unknown label type: float64"),
        ((), 2, [math.inf, 1], "labels: Unknown label type: float64"),
        ((), 2, np.array([None, "a"], dtype=object), "labels: '<' not supported"),
        ((), 0, [], "labels: hold no class"),
        (("model.head=learned",), 2, [1, 2], "labels: hold 2 classes, and the model has a learned"
         " head for 3; give images of 3 classes"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(
    make_config: MakeConfig, overrides: tuple[str, ...], given: int, labels: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        classifier(make_config, *overrides).fit(images((2, 1))[0][:given], labels)
    assert str(caught.value).startswith(message)


def test_a_misspelt_checkpoint_is_a_mistake() -> None:
    with pytest.raises(UserError, match="which: is 'beste'; give best, last or None"):
        raymaml.FewShotClassifier.load("runs/x", which="beste")


def test_all_images_that_cannot_be_read_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    given = [images((1,))[0][0], text, tmp_path / "absent.png", np.zeros((2, 2, 7))]
    with pytest.raises(UserError) as caught:
        classifier(make_config).fit(given, ["a", "b", "c", "d"])
    named = [problem.split(":")[0] for problem in caught.value.problems]
    assert named == ["images[1]", "images[2]", "images[3]"]
    assert caught.value.problems[1].endswith("absent.png: does not exist; mend the path")
    for wrong in ("text.png", 3, np.zeros((2, 2))):
        with pytest.raises(UserError, match=r"^images: is of"):
            classifier(make_config).fit(wrong, ["a", "b"])


def test_copies_of_an_image_do_not_recognise_each_other(make_config: MakeConfig) -> None:
    """Each picture counts once in a class, so that none is judged by its own copy."""
    pixels, labels = images((3, 2, 2))
    found = classifier(make_config, "seed=4")
    alone = found.fit(pixels, labels).leave_one_out()
    again = np.tile(pixels, (3, 1, 1, 1))
    assert found.fit(again, np.tile(labels, 3)).leave_one_out() == alone
    one = np.repeat(images((1, 1))[0], 2, axis=0)
    assert found.fit(one, ["a", "a", "b", "b"]).leave_one_out() is None


def test_probabilities_that_are_not_finite_are_named(make_config: MakeConfig) -> None:
    found = classifier(make_config, "inner.lr=1e30", "inner.num_steps=1").fit(*images((2, 2)))
    for weight in found._fitted().fast.params.values():
        weight.fill_(1e38)
    with pytest.raises(UserError, match="probabilities are not finite; take a lower rate"):
        found.predict(images((1,))[0])


@pytest.mark.parametrize("labels", [["a"], [["a"], ["a"], ["b"]]])
def test_a_score_needs_a_label_for_each_image(make_config: MakeConfig, labels: Any) -> None:
    pixels, right = images((2, 1))
    found = classifier(make_config).fit(pixels, right)
    with pytest.raises(UserError, match=r"labels: are of shape .*, for 3 images; give a label"):
        found.score(pixels, labels)


def test_weights_that_are_not_finite_are_named(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="the adapted weights are not finite"):
        classifier(make_config, "inner.lr=1e38", "inner.num_steps=5").fit(*images((2, 2)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "model: is None"),
        ({"model": "no-such://place"}, "model: is 'no-such://place', and it"),
        ({"model": "runs/none"}, "runs/none: holds no checkpoint"),
        ({"model": "runs/none.yaml"}, "runs/none.yaml: "),
        ({"model": "runs", "device": "abacus"}, "device: 'abacus' is no device"),
        ({"model": "runs", "device": "meta:x"}, "device: 'meta:x' is no device"),
    ],
)
def test_a_model_that_cannot_be_opened(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        raymaml.FewShotClassifier(**params).fit(*images((1, 1)))
    assert str(caught.value).startswith(message)


def test_a_classifier_that_was_not_fitted() -> None:
    with pytest.raises(UserError, match="has no classes yet; call fit first"):
        raymaml.FewShotClassifier().predict([])
