"""raymaml: train and judge MAML on one CPU, one GPU or a Ray cluster.

For people who write their own loop, these names are stable: ``MetaLearner``, ``EpisodeBatch``,
``Episode``, ``InnerConfig``, ``ModelConfig``, ``build_model``, ``apply_policies``,
``check_gradient``, ``UserError``, and the module ``raymaml.convert``; for people who judge models
of their own: ``judge``, ``paired``, ``load_config``, ``load_learner``, ``predictor``, ``features``,
``nearest_class_mean``. They are imported when first asked for, so that ``import raymaml`` is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymaml import convert
    from raymaml.common.errors import UserError
    from raymaml.config.load import load_config
    from raymaml.config.model import InnerConfig, ModelConfig
    from raymaml.evaluation.external import (
        features,
        judge,
        load_learner,
        nearest_class_mean,
        predictor,
    )
    from raymaml.evaluation.paired import paired
    from raymaml.meta.agreement import check_gradient
    from raymaml.meta.learner import MetaLearner
    from raymaml.models import build_model
    from raymaml.models.policies import apply_policies
    from raymaml.types import Episode, EpisodeBatch

try:
    __version__ = version("raymaml")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Episode",
    "EpisodeBatch",
    "InnerConfig",
    "MetaLearner",
    "ModelConfig",
    "UserError",
    "__version__",
    "apply_policies",
    "build_model",
    "check_gradient",
    "convert",
    "features",
    "judge",
    "load_config",
    "load_learner",
    "nearest_class_mean",
    "paired",
    "predictor",
]

_HOMES = {
    "Episode": "raymaml.types",
    "EpisodeBatch": "raymaml.types",
    "InnerConfig": "raymaml.config.model",
    "MetaLearner": "raymaml.meta.learner",
    "ModelConfig": "raymaml.config.model",
    "UserError": "raymaml.common.errors",
    "apply_policies": "raymaml.models.policies",
    "build_model": "raymaml.models",
    "check_gradient": "raymaml.meta.agreement",
    "features": "raymaml.evaluation.external",
    "judge": "raymaml.evaluation.external",
    "load_config": "raymaml.config.load",
    "load_learner": "raymaml.evaluation.external",
    "nearest_class_mean": "raymaml.evaluation.external",
    "paired": "raymaml.evaluation.paired",
    "predictor": "raymaml.evaluation.external",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name == "convert":
        return importlib.import_module("raymaml.convert")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raymaml' has no attribute {name!r}")
