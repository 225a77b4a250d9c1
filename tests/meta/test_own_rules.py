"""A user's own update rule: each of its mistakes is one message, before anything starts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from raymaml import Episode, InnerConfig, MetaLearner, UserError

TRIAL = "inner.rule: helpers_rules:{} fails in a trial step "
REFUSED = {
    "Raises": TRIAL + "(ValueError: boom)",
    "Forgets": "inner.rule: helpers_rules:{}: parameters: body.weight is of shape [2, 3] before a"
    " step, and none after it; update returns every parameter",
    "ForgetsState": "inner.rule: helpers_rules:{}: state mean: body.weight is of shape [2, 3]"
    " before a step, and none after it",
    "Scalars": "inner.rule: helpers_rules:{}: parameters: body.weight is of shape [2, 3] before a"
    " step, and [] after it",
    "InPlace": TRIAL + "(RuntimeError: a leaf Variable",
    "Arrays": TRIAL + "(TypeError: body.weight is of type ndarray, and must be a tensor)",
    "Flat": TRIAL + "(AttributeError: 'Tensor' object has no attribute 'items')",
    "Unfinished": "inner.rule: helpers_rules:{} cannot be built (TypeError: Can't instantiate",
    "Missing": "inner.rule: helpers_rules:{} cannot be imported (AttributeError: module",
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.flatten(1)))


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_of_a_rule_is_one_message(name: str) -> None:
    model, draws = Model(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(REFUSED[name].format(name))):
        MetaLearner(model, InnerConfig(rule=f"helpers_rules:{name}", rates="shared"))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert name == "Missing" or draws.equal(torch.get_rng_state())


@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop", "alfa", "helpers_rules:Damped"])
def test_every_rule_takes_a_model_of_which_nothing_adapts(rule: str) -> None:
    learner = MetaLearner(Model(), InnerConfig(rule=rule, frozen=("*",), num_steps=2))
    x, y = torch.ones(2, 1, 1, 3), torch.tensor([0, 1])
    episode = Episode(support_x=x, support_y=y, query_x=x, query_y=y)
    result = learner.episode_gradient(episode)
    # theta is as it was: softmax regression of the query images
    assert result.logits.allclose(learner.model(x))
