"""Two artefacts of the reference's meta-gradient, which raymaml does not repeat.

Running moments: the reference moves them in place before it differentiates the graph of the
meta-batch. So it normalises each query pass by the moments of its time, and differentiates it with
those that the last episode leaves behind. For the norm policy ``running`` the golden vectors differ
from the exact gradient by 5e-3 (relative), and from the gradient below by rounding.

First order: the reference drops the Hessian alone. It still differentiates through weight decay,
and through the momentum of the decay, where FOMAML takes the query gradient at the adapted weights.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from raymaml.config.model import InnerConfig
from raymaml.meta.calls import one_at_a_time
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.learner import MetaLearner
from raymaml.meta.rules import learning_rate
from raymaml.meta.start import restored
from raymaml.models.norm import RunningNorm2d
from raymaml.types import Episode, EpisodeBatch, Params


class ReferenceRunningNorm2d(RunningNorm2d):
    """``running``, whose training query pass is differentiated with the moments ``last``."""

    last: tuple[Tensor, Tensor] | None = None
    """Mean and variance, each [C]; the layer's own if None."""

    def forward(self, x: Tensor, window: int = 1) -> Tensor:
        """Normalise."""
        normalised = super().forward(x, window)
        if self.last is None or not self.training or self.current_pass != "query":
            return normalised
        differentiated = self._by(x, *self.last, window)
        return differentiated + (normalised - differentiated).detach()


@one_at_a_time
class ReferenceLearner(MetaLearner):
    """A learner whose gradients are the reference's."""

    def episode_gradient(self, episode: Episode) -> EpisodeGradient:
        """As ``MetaLearner.episode_gradient``, but for first order with weight decay."""
        result = super().episode_gradient(episode)
        if self.inner.gradient != "first_order":
            return result
        adapted = {
            name: grad * decay_factor(name, self.inner)
            for name, grad in result.grads.items()
            if name not in self._frozen
        }
        return replace(result, grads=result.grads | adapted)

    def meta_gradient(
        self, episodes: EpisodeBatch, *, update_moments: bool = False
    ) -> tuple[Tensor, Tensor, Params]:
        """As ``MetaLearner.meta_gradient``, at the cost of a first-order sweep more."""
        layers = [m for m in self.model.modules() if isinstance(m, ReferenceRunningNorm2d)]
        if not layers:
            return super().meta_gradient(episodes, update_moments=update_moments)
        inner = self.inner
        try:
            with restored(self.model):
                self.inner = inner.model_copy(update={"gradient": "first_order"})
                super().meta_gradient(episodes, update_moments=True)
                last = [(layer.mean.clone(), layer.var.clone()) for layer in layers]
            self.inner = inner
            for layer, moments in zip(layers, last, strict=True):
                layer.last = moments
            return super().meta_gradient(episodes, update_moments=update_moments)
        finally:
            self.inner = inner
            for layer in layers:
                layer.last = None


def decay_factor(name: str, inner: InnerConfig) -> float:
    """Return the derivative of an adapted weight in where it started, inner gradients held fixed.

    The recursion of ``raymaml.meta.mixed_mode`` with a Hessian of zero; 1 without weight decay.
    """
    lam, nu = 1.0, 0.0
    for _ in range(inner.num_steps):
        u = nu - learning_rate(name, inner) * lam
        lam, nu = lam + inner.weight_decay * u, inner.momentum * u
    return lam


def with_their_gradients(learner: MetaLearner) -> ReferenceLearner:
    """Return a learner over the same model whose gradients are the reference's."""
    model = learner.model
    found = {n: m for n, m in model.named_modules() if isinstance(m, RunningNorm2d)}
    for name, layer in found.items():
        new = ReferenceRunningNorm2d(layer.weight.numel(), layer.eps, layer.momentum)
        new.weight, new.bias, new.mean, new.var = layer.weight, layer.bias, layer.mean, layer.var
        model.set_submodule(name, new)
    return ReferenceLearner(model, learner.inner, head=learner.head)
