"""Encoders of timm and torchvision: their networks without the classifier."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from torch import Tensor, nn

from raymaml.common.errors import UserError, reason_of
from raymaml.config.model import LIBRARIES, PRETRAINED, ModelConfig

_EXTRAS = {"timm": "pip install raymaml[timm]", "torchvision": "pip install torchvision"}


class NormAct(nn.Module):
    """timm's ``BatchNormAct2d`` in parts, so that ``model.norm`` can replace the norm."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
        self.norm.load_state_dict(layer.state_dict(), strict=False)
        self.drop, self.act = layer.get_submodule("drop"), layer.get_submodule("act")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop, activate."""
        out: Tensor = self.act(self.drop(self.norm(x)))
        return out


def library_encoder(model: ModelConfig, channels: int, *, pretrained: bool = False) -> nn.Module:
    """Build the encoder that ``timm:NAME`` or ``torchvision:NAME`` names.

    Args:
        model: ``encoder`` and ``encoder_args`` decide.
        channels: C of the images; torchvision's networks take 3.
        pretrained: with the weights that the library downloads; otherwise with random ones.

    Raises:
        UserError: the library is not installed, has no such network, or cannot build it from
            ``encoder_args`` or for such images, or the weights cannot be downloaded.
    """
    library, _, name = model.encoder.partition(":")
    module = imported(library)
    _require_known(name, _names(module), f"{library} {module.__version__}")
    if library == "torchvision" and channels != 3:
        raise UserError(
            f"model.encoder: {model.encoder} takes images of 3 channels, these have {channels}",
            remedy="import them in colour (data.source.mode: rgb), or take the encoder from timm",
        )
    try:
        if library == "timm":
            return _of_timm(module, name, channels, pretrained, model.encoder_args)
        return _of_torchvision(module, name, pretrained, model.encoder_args)
    except Exception as error:  # of any kind: of the network, of the library, of its arguments
        reason = f"({type(error).__name__}: {reason_of(error)[:300]})"
        if pretrained:
            raise UserError(
                f"model.weights: {PRETRAINED} weights of {model.encoder} cannot be had {reason}",
                remedy="check the network, or bring the file here and name it in model.weights",
            ) from error
        raise UserError(
            f"model.encoder: {model.encoder} cannot be built with model.encoder_args"
            f" {model.encoder_args} {reason}"
        ) from error


def library_versions(model: ModelConfig) -> dict[str, str]:
    """Return the version of the encoder's library by its name; empty where there is none.

    Raises:
        UserError: the library is not installed.
    """
    return {} if model.library is None else {model.library: imported(model.library).__version__}


def library_names(library: str) -> list[str]:
    """Return the encoders of a library, as ``library:NAME``.

    Raises:
        UserError: it is not one of ``LIBRARIES``, or not installed.
    """
    if library not in LIBRARIES:
        raise UserError(f"list_encoders: {library!r} is none of {', '.join(LIBRARIES)}")
    return [f"{library}:{name}" for name in _names(imported(library))]


def imported(library: str) -> ModuleType:
    """Import timm or torchvision.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"model.encoder: {library} cannot be imported ({reason_of(error)})",
            remedy=_EXTRAS[library],
        ) from error


def _names(library: ModuleType) -> list[str]:
    if library.__name__ == "timm":
        return list(library.list_models())
    return list(library.models.list_models(module=library.models))  # without detectors and such


def _require_known(name: str, names: list[str], library: str) -> None:
    base = name.partition(".")[0]  # timm names a set of weights behind a dot
    if base not in names:
        near = difflib.get_close_matches(base.lower(), names, n=4, cutoff=0.5)
        raise UserError(
            f"model.encoder: {library} has no network {name}"
            + (f"; near are {', '.join(near)}" if near else "")
        )


def _of_timm(
    timm: ModuleType, name: str, channels: int, pretrained: bool, args: dict[str, object]
) -> nn.Module:
    network: nn.Module = timm.create_model(
        name, pretrained=pretrained, in_chans=channels, num_classes=0, **args
    )
    for place, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and type(module).__name__ == "BatchNormAct2d":
            network.set_submodule(place, NormAct(module))
        if "fused_attn" in vars(module):  # PyTorch has no second derivative of it
            vars(module)["fused_attn"] = False
    return network


def _of_torchvision(
    torchvision: ModuleType, name: str, pretrained: bool, args: dict[str, object]
) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(
        name, weights="DEFAULT" if pretrained else None, **args
    )
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    network.set_submodule(list(layers)[-1], nn.Identity())  # the classifier is the last
    return network
