"""Tensors that are no episode are refused in words, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.types import Episode, EpisodeBatch

X = torch.zeros
Y = torch.tensor([[0, 1, 2], [2, 0, 1]])


def batch(**changes: Any) -> EpisodeBatch:
    """2 episodes of 3 ways and 1 shot, and 2 queries of each."""
    tensors: dict[str, Any] = {
        "support_x": X(2, 3, 1, 4, 4),
        "support_y": Y,
        "query_x": X(2, 6, 1, 4, 4),
        "query_y": Y.repeat(1, 2),
    }
    return EpisodeBatch(**(tensors | changes))


class Model(nn.Module):
    def __init__(self, rows: int = 3, name: str = "head") -> None:
        super().__init__()
        setattr(self, name, nn.Linear(16, rows))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = getattr(self, self.name)(x.flatten(1))
        return logits


def learner(rows: int = 3, head: Any = "learned") -> raymaml.MetaLearner:
    return raymaml.MetaLearner(Model(rows), InnerConfig(num_steps=1), head_start=head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support_y": Y + 1}, "support_y: holds the labels 1, 2, 3 on 3"),
        ({"query_y": Y.repeat(1, 2) + 1}, "query_y: holds the label 3; the support set has the"),
        ({"query_y": Y.repeat(1, 2) - 100}, "query_y: holds the label -100; labels are 0 to N-1"),
        ({"support_y": torch.tensor([[0, 1, 2], [0, 1, 1]])}, "label 2 of episode 1 has no supp"),
        ({"support_y": Y * 10**9}, "labels 0, 1000000000, 2000000000 on 3 images"),
        (
            {"support_y": Y.float()},
            "query_y: holds torch.int64; targets are labels, .* in both sets",
        ),
        ({"query_y": Y.float()}, "query_y: holds torch.float32; targets are labels, whole numbers"),
        ({"support_batches": X(2, 4, 2)}, "support_batches: holds torch.float32; give row numbers"),
        ({"support_batches": Y}, r"is of shape \[2, 3\]; they are .* inner step, \[E, T, B\]"),
        ({"support_batches": Y[:1, None]}, r"support_batches: is of shape \[1, 1, 3\]; they are"),
        ({"support_batches": Y[..., None][..., :0]}, r"support_batches: is of shape \[2, 3, 0\]"),
        (
            {"support_batches": Y[:, None] + 1},
            "holds rows from 1 to 3; support_x has the rows 0 t",
        ),
        ({"support_batches": Y[:, None] - 1}, "holds rows from -1 to 1; support_x has the rows 0"),
        ({"support_batches": [[0]]}, "support_batches: is of type list; give a torch.Tensor"),
        ({"query_y": Y.bool()}, "query_y: holds torch.bool; targets are labels, whole numbers"),
        ({"query_x": X(2, 0, 1, 4, 4), "query_y": X(2, 0).long()}, "query_x: holds no image"),
        ({"support_x": X(2, 3, 1, 4, 4).byte()}, "support_x: holds torch.uint8; images are float"),
        ({"query_x": X(2, 6, 1, 4, 4).half()}, r"query_x: holds torch.float16; .* give x.float"),
        ({"query_x": X(2, 6, 1, 4, 4).double()}, "query_x: holds torch.float64, support_x torch.f"),
        ({"support_x": X(6, 1, 4, 4)}, r"support_x: is of shape \[6, 1, 4, 4\]; images are \[E, n"),
        ({"support_y": Y[:, :2]}, r"support_y: is of shape \[2, 2\]; .* need targets of shape"),
        ({"query_x": X(3, 6, 1, 4, 4), "query_y": X(3, 6).long()}, "3 episodes, support_x 2"),
        ({"query_x": X(2, 6, 3, 4, 4)}, r"query_x: has images of shape \[3, 4, 4\], support_x of"),
        ({"support_y": [[0, 1, 2]] * 2}, "support_y: is of type list; give a torch.Tensor"),
        ({"query_x": torch.empty(2, 6, 1, 4, 4, device="meta")}, "lies on another device than the"),
    ],
)
def test_tensors_that_are_no_episode_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"EpisodeBatch\..*{message}"):
        batch(**changes)


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        batch(support_x=X(2, 3, 1, 4, 4).byte(), support_y=Y.float(), query_y=Y)
    assert len(caught.value.problems) == 4, caught.value.problems  # the types of x differ too


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_targets_that_are_no_labels_are_of_any_shape(shape: tuple[int, ...]) -> None:
    sets = {"support_x": X(2, 3, 5), "support_y": X(2, 3, *shape)}
    sets |= {"query_x": X(2, 7, 5), "query_y": X(2, 7, *shape)}
    found = EpisodeBatch(**sets)
    assert torch.equal(found.query_y, sets["query_y"])
    assert found[1].channels_last().query_x.shape == (7, 5)
    for changes, message in (
        (
            {"query_y": X(2, 7, *shape).double()},
            "query_y: holds torch.float64, query_x torch.float32",
        ),
        (
            {"query_y": X(2, 6, *shape)},
            r"query_y: is of .* the inputs of query_x need targets of shape \[2, 7, ...\]",
        ),
        ({"query_x": X(2, 7, 4)}, r"query_x: has inputs of shape \[4\], support_x of \[5\]"),
        ({"query_x": X(2)}, r"query_x: is of shape \[2\]; inputs are \[E, n, ...\]"),
        ({"query_x": X(2, 0, 5), "query_y": X(2, 0, *shape)}, "query_x: holds no input"),
    ):
        with pytest.raises(UserError, match=rf"EpisodeBatch\.{message}"):
            EpisodeBatch(**(sets | changes))


@pytest.mark.parametrize("kind", ["uint8", "int32", "uint32"])
def test_labels_of_any_width_are_taken(kind: str) -> None:
    labels = Y.to(getattr(torch, kind))
    found = batch(support_y=labels, query_y=labels.long().repeat(1, 2).to(labels.dtype))
    assert found.support_y.dtype == found.query_y.dtype == torch.int64
    assert learner().meta_gradient(found)[0].isfinite()


def test_a_given_number_of_ways_is_that_of_the_labels() -> None:
    right = EpisodeBatch(**{**vars(batch()), "num_ways": 3})
    assert right.num_ways == 3
    with pytest.raises(UserError, match=r"EpisodeBatch\.num_ways: is 4, and .* labels 0 to 2"):
        replace(right, num_ways=4)
    with pytest.raises(UserError, match=r"Episode\.num_ways: is 2"):
        replace(right[0], num_ways=2)


def test_an_episode_alone_is_checked_alike() -> None:
    one = batch()[0]
    with pytest.raises(UserError, match=r"Episode\.support_y: label 0 has no support image"):
        Episode(**(vars(one) | {"support_y": torch.tensor([1, 2, 2])}))
    with pytest.raises(UserError, match=r"Episode\.support_x: is of shape .* images are \[n, C"):
        Episode(**(vars(one) | {"support_x": one.support_x[0]}))
    few = Episode(**(vars(one) | {"query_x": one.query_x[:1], "query_y": one.query_y[:1]}))
    assert len(few.query_y) == 1  # not every class needs a query


CALLS: dict[str, Callable[[raymaml.MetaLearner], Any]] = {
    "meta_gradient": lambda it: it.meta_gradient(batch()),
    "chunk_gradients": lambda it: it.chunk_gradients(batch()),
    "episode_gradient": lambda it: it.episode_gradient(batch()[0]),
    "predict": lambda it: it.predict(batch()),
    "logits_by_step": lambda it: it.logits_by_step(batch()[0]),
    "adapt": lambda it: list(it.adapt(batch()[0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_head_that_does_not_fit_and_inference_mode_are_refused(name: str) -> None:
    for rows in (2, 5):
        says = rf"head: has {rows} rows and the episode 3 classes; build"
        with pytest.raises(UserError, match=says):
            CALLS[name](learner(rows))
    it = learner()
    with torch.no_grad():  # it changes nothing
        CALLS[name](it)
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode: an episode is"):
        CALLS[name](it)


def test_the_gradient_under_no_grad_is_the_gradient() -> None:
    it = learner()
    expected = it.meta_gradient(batch())[2]
    with torch.no_grad():
        found = it.meta_gradient(batch())[2]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert expected["head.bias"].abs().sum() > 0


def test_tensors_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        made = batch()
    with pytest.raises(UserError, match=r"support_x: was made in torch.inference_mode"):
        learner().meta_gradient(made)


def test_a_head_by_another_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"no linear layer named head \(its linear layers are fc\)"):
        raymaml.MetaLearner(Model(name="fc"), InnerConfig())
    with pytest.raises(UserError, match=r"named head \(it has no linear layer\)"):
        raymaml.MetaLearner(nn.Conv2d(1, 1, 1), InnerConfig())


def test_models_of_other_people_get_checked_labels() -> None:
    for predict in (raymaml.predictor(learner()), raymaml.nearest_class_mean()):
        assert predict(X(3, 1, 4, 4), Y[0].to(torch.int16), X(2, 1, 4, 4)).shape == (2, 3)
        with pytest.raises(UserError, match=r"label 0.* has no support image"):
            predict(X(3, 1, 4, 4), torch.tensor([1, 2, 2]), X(2, 1, 4, 4))
