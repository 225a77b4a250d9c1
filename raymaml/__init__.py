"""raymaml: train and judge MAML on one CPU, one GPU or a Ray cluster.

These names are stable. To do as the commands do: ``episodes``, ``train``, ``test``, ``report``,
``load_config``. For a loop of your own: ``MetaLearner``, ``EpisodeBatch``, ``Episode``,
``InnerConfig``, ``Rule``, ``ModelConfig``, ``build_model``, ``create_encoder``, ``list_encoders``,
``list_norms``, ``apply_policies``, ``check_gradient``, ``UserError``, and the module
``raymaml.convert``. To judge a model of your own: ``judge``, ``paired``, ``load_learner``,
``predictor``, ``features``, ``nearest_class_mean``, ``cosine_similarity``. To use a trained model
on one's own images: ``FewShotClassifier``. Each is imported at its first use, so that
``import raymaml`` is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers: the same names as in _HOMES
    from raymaml import convert as convert
    from raymaml.classify.classifier import FewShotClassifier as FewShotClassifier
    from raymaml.common.errors import UserError as UserError
    from raymaml.config.inner import InnerConfig as InnerConfig
    from raymaml.config.load import load_config as load_config
    from raymaml.config.model import ModelConfig as ModelConfig
    from raymaml.evaluation.external import judge as judge
    from raymaml.evaluation.external import load_learner as load_learner
    from raymaml.evaluation.paired import paired as paired
    from raymaml.library import Episodes as Episodes
    from raymaml.library import ReportResult as ReportResult
    from raymaml.library import TrainResult as TrainResult
    from raymaml.library import episodes as episodes
    from raymaml.library import report as report
    from raymaml.library import test as test
    from raymaml.library import train as train
    from raymaml.meta.learner import MetaLearner as MetaLearner
    from raymaml.meta.rules.rule import Rule as Rule
    from raymaml.models import build_model as build_model
    from raymaml.models import list_encoders as list_encoders
    from raymaml.models import list_norms as list_norms
    from raymaml.models.policies import apply_policies as apply_policies
    from raymaml.training.agreement import check_gradient as check_gradient
    from raymaml.training.features import cosine_similarity as cosine_similarity
    from raymaml.training.features import features as features
    from raymaml.training.features import nearest_class_mean as nearest_class_mean
    from raymaml.training.features import predictor as predictor
    from raymaml.training.weights import create_encoder as create_encoder
    from raymaml.types import Episode as Episode
    from raymaml.types import EpisodeBatch as EpisodeBatch

_HOMES = {
    "classify.classifier": "FewShotClassifier",
    "common.errors": "UserError",
    "config.load": "load_config",
    "config.inner": "InnerConfig",
    "config.model": "ModelConfig",
    "evaluation.external": "judge load_learner",
    "evaluation.paired": "paired",
    "library": "Episodes ReportResult TrainResult episodes report test train",
    "training.agreement": "check_gradient",
    "training.features": "cosine_similarity features nearest_class_mean predictor",
    "meta.learner": "MetaLearner",
    "meta.rules.rule": "Rule",
    "models": "build_model list_encoders list_norms",
    "models.policies": "apply_policies",
    "training.weights": "create_encoder",
    "types": "Episode EpisodeBatch",
}
"""The names of each module."""
_HOME = {name: f"raymaml.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", "convert", *_HOME]  # noqa: PLE0604

try:
    __version__ = version("raymaml")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "convert":
        return importlib.import_module("raymaml.convert")
    if name not in _HOME:
        raise AttributeError(f"module 'raymaml' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
