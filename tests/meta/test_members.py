"""Members of the family that are more than a rule: implicit, Reptile, prototypes, multi-step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_meta import Graph, build, episodes, flat, learner, relative_error
from helpers_quadratic import episode, half_of_squares, joined, line, matrix
from torch import Tensor

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig, MultiStepLoss
from raymaml.meta.learner import MetaLearner
from raymaml.meta.objective import query_weights
from raymaml.passes.batches import drawn_batches
from raymaml.types import Episode, EpisodeBatch

SCHEDULE = Path(__file__).parents[3] / "shared/family/mamlpp-second-order/expected.npz"
CONVERGED = {"gradient": "implicit", "num_steps": 150, "lr": 0.3, "proximal": 1.0, "cg_steps": 60}


@pytest.mark.parametrize("frozen", [(), ("a",), ("b", "head.bias")])
def test_implicit_is_the_slope_of_the_converged_loss_in_frozen_parts_too(frozen: Any) -> None:
    """150 steps leave 0.7^150 = 6e-24 of the way; each parameter moves along one direction."""
    maml, one = learner(Graph, **CONVERGED, weight_decay=0.1, frozen=frozen), episodes(size=4)[0]
    maml.double()
    found, generator = maml.episode_gradient(one), torch.Generator().manual_seed(0)
    assert found.metrics["cg_residual"] < 1e-10
    for name, value in maml.model.named_parameters():
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                value.add_(sign * 1e-5 * direction)
            losses.append(maml.episode_gradient(one).loss)
        with torch.no_grad():
            value.add_(1e-5 * direction)
        wanted = ((losses[0] - losses[1]) / 2e-5).item()
        assert (found.grads[name] * direction).sum().item() == pytest.approx(
            wanted, rel=1e-6, abs=1e-8
        )


@pytest.mark.parametrize("gradient", ["implicit", "reptile"])
def test_a_chunk_is_the_loop(gradient: str) -> None:
    inner = {**CONVERGED, "num_steps": 5, "cg_steps": 4} if gradient == "implicit" else {}
    maml, batch = learner(Graph, **{**inner, "gradient": gradient}), episodes(3, size=4)
    maml.double()
    for found, one in zip(maml.chunk_gradients(batch), batch, strict=True):
        wanted = maml.episode_gradient(one)
        assert relative_error(flat(found.grads), flat(wanted.grads)) < 1e-12
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)
        assert found.metrics.keys() == wanted.metrics.keys() == set(maml.metrics)
        for name, value in wanted.metrics.items():
            torch.testing.assert_close(found.metrics[name], value, rtol=1e-9, atol=1e-13)


def test_a_pull_that_is_too_small_is_said_and_stops_the_search() -> None:
    """The loss -1/2 |X phi - y|^2 has the Hessian -A: along g the curvature is 1 - g A g / lambda
    g g, which is below 0 at once, so that no step is taken."""
    built = line(gradient="implicit", proximal=0.01, num_steps=1, head_lr=None)
    down = MetaLearner(built.model, built.inner, loss_fn=lambda o, t: -half_of_squares(o, t))
    with pytest.warns(
        RuntimeWarning, match=r"inner\.proximal is too small: I \+ H / lambda is not"
    ):
        found = down.episode_gradient(episode())
    (a, b), (q, c), phi = (
        matrix("support"),
        matrix("query"),
        joined(dict(built.model.named_parameters())),
    )
    end = phi + 0.1 * (a @ phi - b)
    g = -(q @ end - c)
    curvature = 1 - g @ a @ g / 0.01 / (g @ g)
    assert curvature < -1
    assert found.metrics["cg_curvature"].item() == pytest.approx(curvature, rel=1e-12)
    assert found.metrics["cg_residual"].item() == pytest.approx(np.linalg.norm(g), rel=1e-12)
    assert not joined(found.grads).any()


def test_an_indefinite_system_stops_after_the_steps_that_went_down() -> None:
    """Conjugate gradients take the same steps as on a definite one until a direction goes up."""
    built = line(gradient="implicit", proximal=1.2, num_steps=1, head_lr=None, cg_steps=20)
    down = MetaLearner(built.model, built.inner, loss_fn=lambda o, t: -half_of_squares(o, t))
    a = matrix("support")[0]
    values = np.linalg.eigvalsh(np.eye(5) - a / 1.2)
    assert values[0] < 0 < values[-1]
    with pytest.warns(RuntimeWarning, match="inner.proximal is too small"):
        found = down.episode_gradient(episode())
    assert np.isfinite(joined(found.grads)).all()
    assert found.metrics["cg_curvature"].item() <= 0


def test_without_a_query_gradient_there_is_nothing_to_solve() -> None:
    maml = build(head="zero", frozen=("head",), gradient="implicit", proximal=1.0)
    found = maml.episode_gradient(episodes()[0])
    assert not flat({name: found.grads[name] for name in maml.params}).any()
    assert found.metrics["cg_curvature"] == 1


def test_reptile_learns_only_what_adapts() -> None:
    with pytest.raises(UserError, match=r"only parameters that adapt, and not a;"):
        learner(Graph, "reptile", frozen=("a",))
    inner = InnerConfig(gradient="reptile")
    with pytest.raises(UserError, match=r"only parameters that adapt, and not prototypes"):
        MetaLearner(Graph(), inner, head_start="prototypes")
    with pytest.raises(UserError, match=r"reptile, .* helpers_rules:Damped learns"):
        line(rule="helpers_rules:Damped", gradient="reptile")


def test_implicit_learns_nothing_of_a_rule() -> None:
    with pytest.raises(UserError, match=r"implicit, .* helpers_rules:Damped learns"):
        line(rule="helpers_rules:Damped", gradient="implicit", proximal=1.0)


def test_logits_of_prototypes_are_negative_squared_distances() -> None:
    """|f - c|^2 = |f|^2 - (2 c f - |c|^2): up to |f|^2, which all classes of an image share."""
    maml, one = build(norm="layer", head="prototypes"), episodes()[0]
    with torch.no_grad():
        features = [maml.model.encoder(x) for x in (one.support_x, one.query_x)]
        means = torch.stack([features[0][one.support_y == way].mean(0) for way in range(3)])
        wanted = -torch.cdist(features[1], means).square()
    found = maml.logits_by_step(one)[0]
    torch.testing.assert_close(found - found[:, :1], wanted - wanted[:, :1], rtol=1e-10, atol=1e-12)
    assert (found - found[:, :1]).std() > 1e-4
    assert not [name for name in maml.params if name.startswith("head")]
    assert maml.predict(episodes(2, ways=5)).shape == (2, 15, 5)
    assert flat(maml.episode_gradient(episodes(ways=5)[0]).grads).isfinite().all()


def test_support_batches_are_shuffled_passes() -> None:
    """6 images in batches of 4: 5 steps are 20 rows, three passes and two rows of a fourth."""
    one = episodes()[0]
    torch.manual_seed(7)
    rows = drawn_batches(one, 4, 5)
    assert rows is not None
    assert rows.shape == (5, 4)
    for first in (0, 6, 12):
        assert sorted(rows.flatten()[first : first + 6].tolist()) == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(rows.flatten()[:6], rows.flatten()[6:12])
    assert drawn_batches(one, 4, 0).shape == (0, 4)  # type: ignore[union-attr]

    maml = build(num_steps=5, support_batch_size=4, gradient="mixed_mode")
    torch.manual_seed(7)
    drawn = flat(maml.episode_gradient(one).grads)
    brought = Episode(**{**vars(one), "support_batches": rows})
    again = build(num_steps=5, gradient="mixed_mode").episode_gradient(brought)
    assert torch.equal(flat(again.grads), drawn)
    torch.manual_seed(8)
    assert relative_error(flat(maml.episode_gradient(one).grads), drawn) > 1e-3


def test_each_step_descends_the_loss_of_its_rows() -> None:
    one, rows = episode(), torch.tensor([[0, 3], [1, 2], [4, 4]])
    *_, last = line(head_lr=None).adapt(Episode(**{**vars(one), "support_batches": rows}))
    phi = joined(dict(line().model.named_parameters()))
    for chosen in rows.tolist():
        x, y = one.support_x.numpy()[chosen], one.support_y.numpy()[chosen, 0]
        phi = phi - 0.1 * x.T @ (x @ phi - y)
    np.testing.assert_allclose(joined(last.params), phi, rtol=1e-13)


def test_batches_that_do_not_fit_the_inner_loop_are_refused() -> None:
    one = episodes()[0]
    with pytest.raises(UserError, match="batch_size is 7, and the support set has 6 images"):
        build(support_batch_size=7).episode_gradient(one)
    rows = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(UserError, match="holds 1 inner steps, and there are 2"):
        build().episode_gradient(Episode(**{**vars(one), "support_batches": rows}))
    both = EpisodeBatch(**{**vars(episodes(2)), "support_batches": rows.expand(2, 2, 2)})
    assert both[1].support_batches.dtype == torch.int64  # type: ignore[union-attr]
    chunk, maml = next(iter(both.chunks(2))), build()
    for found, each in zip(maml.chunk_gradients(chunk), both, strict=True):
        assert relative_error(flat(found.grads), flat(maml.episode_gradient(each).grads)) < 1e-10


def weights(outer_step: int | None, steps: int = 3, **several: int) -> tuple[float, ...]:
    return query_weights(
        InnerConfig(num_steps=steps, multi_step_loss=MultiStepLoss(**several)), outer_step
    )


def test_importance_moves_to_the_last_step() -> None:
    """Stages of 2 outer steps. Shares of 1/3 lose 1/3/4 a stage: 1/3, 1/4, 1/6, 1/12."""
    early = [weights(step, num_outer_steps=8, num_stages=4)[1] for step in range(8)]
    assert early == pytest.approx([1 / 3, 1 / 3, 1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 12, 1 / 12])
    for step in range(8):
        found = weights(step, num_outer_steps=8, num_stages=4)
        assert (found[0], sum(found), len(found)) == (0, pytest.approx(1), 4)
    for late in (8, 9, None):
        assert weights(late, num_outer_steps=8, num_stages=4) == (0, 0, 0, 1)
    assert weights(0, steps=0, num_outer_steps=10) == (1.0,)
    assert weights(5, steps=1, num_outer_steps=10) == (0, 1)


@pytest.mark.skipif(not SCHEDULE.exists(), reason="no ../shared/family")
def test_importance_is_that_of_the_code_of_maml_plus_plus() -> None:
    wanted = np.load(SCHEDULE)["importance_by_epoch"]
    for epoch in range(10):  # of 50 outer steps
        for outer_step in (50 * epoch, 50 * epoch + 49):
            found = weights(outer_step, num_outer_steps=500, num_stages=10)
            np.testing.assert_allclose(found[1:], wanted[epoch], rtol=1e-12)


def test_a_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step() -> None:
    maml, one = build(multi_step_loss={"num_outer_steps": 4, "num_stages": 2}), episodes()[0]
    logits: Tensor = maml.logits_by_step(one)
    losses = [torch.nn.functional.cross_entropy(each, one.query_y).item() for each in logits]
    for outer_step, shares in ((0, (0.5, 0.5)), (3, (0.25, 0.75)), (4, (0, 1)), (None, (0, 1))):
        wanted = shares[0] * losses[1] + shares[1] * losses[2]
        assert maml.episode_gradient(one, outer_step).loss.item() == pytest.approx(
            wanted, rel=1e-12
        )
