"""raymaml: train and judge MAML on one CPU, one GPU or a Ray cluster.

These names are stable. For a loop of your own: ``MetaLearner``, ``EpisodeBatch``, ``Episode``,
``InnerConfig``, ``ModelConfig``, ``build_model``, ``apply_policies``, ``check_gradient``,
``UserError``, and the module ``raymaml.convert``. To judge a model of your own: ``judge``,
``paired``, ``load_config``, ``load_learner``, ``predictor``, ``features``, ``nearest_class_mean``.
Each is imported at its first use, so that ``import raymaml`` is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymaml import convert
    from raymaml.common.errors import UserError
    from raymaml.config.load import load_config
    from raymaml.config.model import InnerConfig, ModelConfig
    from raymaml.evaluation.external import judge, load_learner
    from raymaml.evaluation.paired import paired
    from raymaml.meta.agreement import check_gradient
    from raymaml.meta.features import features, nearest_class_mean, predictor
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
    "raymaml.common.errors": {"UserError"},
    "raymaml.config.load": {"load_config"},
    "raymaml.config.model": {"InnerConfig", "ModelConfig"},
    "raymaml.evaluation.external": {"judge", "load_learner"},
    "raymaml.evaluation.paired": {"paired"},
    "raymaml.meta.agreement": {"check_gradient"},
    "raymaml.meta.features": {"features", "nearest_class_mean", "predictor"},
    "raymaml.meta.learner": {"MetaLearner"},
    "raymaml.models": {"build_model"},
    "raymaml.models.policies": {"apply_policies"},
    "raymaml.types": {"Episode", "EpisodeBatch"},
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "convert":
        return importlib.import_module("raymaml.convert")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'raymaml' has no attribute {name!r}")
