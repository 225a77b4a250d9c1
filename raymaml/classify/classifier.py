"""A trained model used on a person's own images, as scikit-learn's estimators are."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raymaml.classify.adaptation import Adaptation, LeaveOneOut, Pixels, adapt, leave_one_out
from raymaml.classify.export import export
from raymaml.classify.inputs import InputError, classes_of, labels_of, pixels_of
from raymaml.classify.saved import Saved, is_saved, read_classifier, write_classifier
from raymaml.common.errors import UserError, did_you_mean
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.data.preprocessing import Preprocessing
from raymaml.storage.place import Place, to_place
from raymaml.training.trained import TrainedModel, open_trained

Model = Config | Place | str | TrainedModel


class FewShotClassifier:
    """A model of raymaml that adapts to a handful of labelled images in ``fit``.

    It keeps the contract of scikit-learn's estimators: ``get_params``, ``set_params``, ``clone``,
    ``cross_val_score`` and the like work. It does not need scikit-learn.

    Args:
        model: the folder of a run or of a saved classifier, on disk or a URI; a config, or its
            YAML file; or the result of ``open_trained``.
        which: the checkpoint of a run; None: the one that its config judges.
        device: such as ``cuda``; None: a GPU if there is one.
        group: number of images that a transductive model judges together, in the given order;
            None: all of a call. An inductive model judges each image alone.
    """

    classes_: NDArray[Any]
    """The labels that ``fit`` was given, sorted, [N]."""
    _opened: tuple[tuple[Any, ...], tuple[TrainedModel, Saved | None]] | None = None
    _adaptation: Adaptation | None = None
    _support: tuple[Pixels, NDArray[np.int64]] | None = None

    def __init__(
        self,
        model: Model | None = None,
        *,
        which: Literal["best", "last"] | None = None,
        device: str | None = None,
        group: int | None = None,
    ) -> None:
        self.model = model
        self.which = which
        self.device = device
        self.group = group

    @classmethod
    def load(cls, model: Model, **params: Any) -> FewShotClassifier:
        """Return a classifier whose model is open; a saved one has its classes.

        Args:
            model: as ``FewShotClassifier`` takes it.
            params: the other parameters of ``FewShotClassifier``.

        Raises:
            UserError: there is no such model, or it is damaged.
        """
        classifier = cls(model, **params)
        if saved := classifier._open()[1]:
            classifier._adaptation, classifier.classes_ = saved
        return classifier

    def save(self, folder: Place | str) -> None:
        """Write weights, adapted weights and a card into a new folder, which ``load`` reads.

        The folder needs neither the run nor its data; it holds no support images.

        Raises:
            UserError: ``fit`` was not called, or ``write_classifier`` refuses.
        """
        write_classifier(_place(folder, "save"), self._fitted(), self.classes_)

    def export(self, file: Place | str) -> None:
        """Write the adapted network as ``.onnx`` or ``.pt2``, see ``raymaml.classify.export``.

        Raises:
            UserError: ``fit`` was not called, or the network cannot be written.
        """
        export(self._fitted(), self.classes_, _place(file, "export"))

    @property
    def trained(self) -> TrainedModel:
        """The model before it adapts, opened at its first use.

        Raises:
            UserError: it cannot be opened, or a parameter is wrong.
        """
        return self._open()[0]

    def _open(self) -> tuple[TrainedModel, Saved | None]:
        key = (self.model, self.which, self.device)
        if self._opened is None or self._opened[0] != key:
            self._opened = key, _opened(*key)
        return self._opened[1]

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes pixels, and pixels a tensor, for this model."""
        return self.trained.preprocessing

    @property
    def caution(self) -> str:
        """A warning of a transductive model; empty for an inductive one."""
        if not self.trained.config.model.is_transductive:
            return ""
        together = "all images given"
        if self.group:
            together = f"up to {self.group} images, in the given order"
        return (
            "model.norm is transductive: the answer for an image depends on the images that are"
            f" judged with it, here {together}; a model with norm context judges each alone"
        )

    def fit(self, images: Any, labels: Any) -> FewShotClassifier:
        """Adapt the model to labelled images, at least one a class.

        Args:
            images: [n] paths, URIs, bytes, PIL images, arrays or tensors, see ``pixels_of``.
            labels: [n] texts or numbers. Classes may have different numbers of images.

        Raises:
            UserError: the model cannot be opened, images cannot be read, the labels do not fit
                them, or the model has a learned head for another number of classes.
        """
        return self.fit_pixels(pixels_of(images, self.preprocessing), labels)

    def fit_pixels(self, pixels: Pixels, labels: Any) -> FewShotClassifier:
        """As ``fit``, to pixels, uint8 [n, H, W, C], that ``preprocessing.pixels`` gave.

        Raises:
            UserError: as ``fit``, but for images.
        """
        trained = self.trained
        classes, numbers = classes_of(labels, len(pixels))
        _require_ways(trained.config, len(classes))
        self._adaptation = adapt(trained, pixels, numbers)
        self._support, self.classes_ = (pixels, numbers), classes
        return self

    def predict(self, images: Any) -> NDArray[Any]:
        """Return the most probable class of each image, [n]."""
        most_probable = self.predict_proba(images).argmax(axis=1)
        found: NDArray[Any] = self.classes_[most_probable]
        return found

    def predict_proba(self, images: Any) -> NDArray[np.float64]:
        """Return the probabilities of the classes, [n, N], in the order of ``classes_``.

        On a CPU the answer of an inductive model for an image has the same bits whatever else is
        in the call. A transductive model judges groups, and warns.

        Raises:
            UserError: images cannot be read, or ``fit`` was not called.
        """
        pixels = pixels_of(images, self._fitted().trained.preprocessing)
        if caution := self.caution:
            warnings.warn(caution, stacklevel=2)
        return self.probabilities(pixels)

    def probabilities(self, pixels: Pixels) -> NDArray[np.float64]:
        """As ``predict_proba``, of pixels, uint8 [n, H, W, C], that ``preprocessing.pixels`` gave,
        and without a warning.

        Raises:
            UserError: ``fit`` was not called, or ``group`` is no number of images.
        """
        adaptation = self._fitted()
        if self.group is not None and self.group < 1:
            raise InputError(f"group: is {self.group}", remedy="give at least 1, or None for all")
        return adaptation.probabilities(pixels, self.group)

    def to(self, device: torch.device) -> FewShotClassifier:
        """Move model and adapted weights to a device, on which ``probabilities`` then judges.

        Raises:
            UserError: ``fit`` was not called.
        """
        self._adaptation = self._fitted().to(device)
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the adapted weights.

        Raises:
            UserError: ``fit`` was not called.
        """
        return self._fitted().digest

    def score(self, images: Any, labels: Any) -> float:
        """Return the share of images whose class is predicted.

        Raises:
            UserError: as ``predict_proba``, or there is not a label for each image.
        """
        found = self.predict(images)
        return float(np.mean(found == labels_of(labels, len(found))))

    def leave_one_out(self, *, seed: int = 0) -> LeaveOneOut | None:
        """Estimate the accuracy from the support images alone.

        Each of them, or 50 drawn by the seed, is predicted by an adaptation to all others. A
        transductive model judges it together with them, any other model alone.

        Returns:
            None where a class has one image, so that nothing can be estimated.

        Raises:
            UserError: ``fit`` was not called.
        """
        adaptation = self._fitted()
        if self._support is None:
            raise UserError(
                "leave_one_out: a saved classifier holds no support images", remedy="call fit"
            )
        return leave_one_out(adaptation.trained, *self._support, seed)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the constructor by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> FewShotClassifier:
        """Set parameters of the constructor. ``fit`` takes them up.

        Raises:
            UserError: there is no such parameter.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise InputError(
                    f"{type(self).__name__}: has no parameter {name}",
                    remedy=f"it has {', '.join(known)}{did_you_mean(name, known)}",
                )
        vars(self).update(params)
        return self

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.get_params().items() if value)
        return f"{type(self).__name__}({', '.join(given)})"

    def __sklearn_is_fitted__(self) -> bool:
        """Tell scikit-learn whether ``fit`` was called."""
        return self._adaptation is not None

    def __sklearn_tags__(self) -> Any:
        """Describe the estimator to scikit-learn, the only caller."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False, three_d_array=True, string=True),
        )

    def _fitted(self) -> Adaptation:
        if self._adaptation is None:
            raise _not_fitted_error()
        return self._adaptation


def _opened(
    model: Model | None, which: Literal["best", "last"] | None, name: str | None
) -> tuple[TrainedModel, Saved | None]:
    if isinstance(model, TrainedModel):
        return model, None
    if which not in (None, "best", "last"):
        raise InputError(f"which: is {which!r}", remedy="give best, last or None")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        _ = torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            f"device: {name!r} is no device that PyTorch can use here", remedy="give cpu"
        ) from None
    if isinstance(model, str | Path) and Path(model).suffix in (".yaml", ".yml"):
        model = load_config(model)
    if not isinstance(model, Config):
        model = _place(model, "model")
        if is_saved(model):
            saved = read_classifier(model, device)
            return saved.adaptation.trained, saved
    return open_trained(model, device, which), None


def _place(value: object, what: str) -> Place:
    try:
        return to_place(value)
    except ValueError as error:
        raise InputError(
            f"{what}: is {value!r}, and it {error}", remedy=f"give a path, as in {what}='runs/...'"
        ) from None


def _require_ways(config: Config, ways: int) -> None:
    own = config.episodes.test.num_ways
    if config.model.head == "learned" and ways != own:
        raise InputError(
            f"labels: hold {ways} classes, and the model has a learned head for {own}",
            remedy=f"give images of {own} classes, or train with model.head: zero, shared or"
            " prototypes",
        )


def _not_fitted_error() -> Exception:
    """Return an error that is also scikit-learn's own, where that is loaded."""
    sklearn = sys.modules.get("sklearn.exceptions")
    kinds = (UserError, sklearn.NotFittedError if sklearn else ValueError)
    error: type[Exception] = type("NotFittedError", kinds, {})
    return error("classifier: has no classes yet", remedy="call fit first")  # type: ignore
