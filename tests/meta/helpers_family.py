"""Cases of the MAML family: their files, and their network with raymaml's blocks and norms.

The shapes of the initial weights give the network; ``config.yaml`` gives the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raymaml import Episode, apply_policies
from raymaml.models.encoders import ConvBlock, StridedBlock
from raymaml.models.heads import Classifier

FAMILY = {
    *("maml", "fomaml", "anil", "boil", "meta-sgd", "metasgd", "maml++", "reptile"),
    *("implicit", "imaml", "official"),
}
"""Words of ``method``; at least one of them names the method."""
EXACT = ("unrolled", "checkpointed", "mixed_mode")
RULES = {"rmsprop": ("beta", "epsilon"), "adam": ("beta1", "beta2", "epsilon"), "sgd": ()}
"""Inner rules and their numbers."""
MOMENTUM = 0.1
"""Weight of the newest batch in running moments."""
Arrays = dict[str, NDArray[Any]]


class UnknownError(Exception):
    """A case holds something that the runner cannot express."""


@dataclass(frozen=True)
class Case:
    """The files of a folder."""

    config: dict[str, Any]
    episodes: Arrays
    initial: Arrays
    expected: Arrays

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Read a folder."""
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        files = []
        for name in ("episodes", "initial", "expected"):
            with np.load(folder / f"{name}.npz") as file:
                files.append(dict(file))
        return cls(config, *files)

    def words(self, *keys: str) -> str:
        """Return the values of these settings, or of all, as one text of small letters."""
        return " ".join(
            str(self.config[k]) for k in keys or self.config if k in self.config
        ).lower()

    def number(self, *keys: str) -> float | None:
        """Return a hyper-parameter by the first of these names that the case has."""
        for key in keys:
            if f"hyper/{key}" in self.initial:
                return float(self.initial[f"hyper/{key}"])
            text = self.words(key) or "".join(re.findall(rf"\b{key}\W.*", self.words()))
            if found := re.search(r"(?<![\w.])-?\d[\d.]*(e[-+]?\d+)?", text):
                return float(found[0])
        return None

    def moved(self, seed: int) -> Case:
        """Return the case with each weight moved by up to one part in 2**20, at random."""
        generator = np.random.default_rng(seed)
        weights = {
            name: value * (1 + generator.uniform(-1, 1, value.shape) * 2**-20)
            for name, value in self.initial.items()
            if not name.startswith("hyper/")
        }
        return replace(self, initial=self.initial | weights)

    def under(self, kind: str) -> Arrays:
        """Return what ``initial.npz`` and ``expected.npz`` hold under ``kind/``."""
        both = (self.initial | self.expected).items()
        return {key.removeprefix(f"{kind}/"): v for key, v in both if key.startswith(f"{kind}/")}

    @property
    def methods(self) -> set[str]:
        """The words that name the method."""
        found = FAMILY.intersection(re.findall(r"[a-z0-9+-]+", self.words("method")))
        if not found:
            raise UnknownError(f"method: {self.config.get('method')!r}; known are {sorted(FAMILY)}")
        return found

    @property
    def rule(self) -> str:
        """The inner rule."""
        text = self.words("inner_optimizer", "inner_rule", "optimizer", "rule")
        if not text or "gradient descent" in text:
            return "sgd"
        for rule in RULES:
            if re.search(rf"\b{rule}\b", text):
                return rule
        raise UnknownError(f"inner rule: {text!r}; known are {', '.join(RULES)}")

    @property
    def steps(self) -> int:
        """Inner steps of training."""
        if (count := self.number("inner_steps", "steps")) is None:
            raise UnknownError("config.yaml holds no inner_steps")
        return int(count)

    @property
    def reported(self) -> int:
        """Inner steps whose losses are expected, at least those of training."""
        return max(self.steps, int(self.number("losses_reported_after") or 0))

    @property
    def importance(self) -> NDArray[Any] | None:
        """The importance of the query loss after each step, if not of the last alone."""
        return self.initial.get("hyper/importance")

    @property
    def gradients(self) -> tuple[str, ...]:
        """The methods of the meta-gradient, which all give one."""
        if "reptile" in self.methods:
            return ("reptile",)
        if self.methods & {"implicit", "imaml"}:
            return ("implicit",)
        order = self.config.get("order", 1 if "fomaml" in self.methods else 2)
        if order not in (1, 2):
            raise UnknownError(f"order: {order!r}; known are 1 and 2")
        return ("first_order",) if order == 1 else EXACT


class LeakyBlock(ConvBlock):
    """raymaml's block with MAML++'s activation, which commutes with the maximum as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.leaky_relu(self.norm(self.conv(x), 2), 0.01)


class Encoder(nn.Module):
    """Blocks; their output is flattened, or averaged over positions if it has too many numbers."""

    def __init__(self, weights: Arrays, block: type[nn.Module], num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        for name, value in weights.items():
            if name.endswith("conv.weight"):
                width, channels = value.shape[:2]
                self.add_module(name.split(".")[1], block(channels, width))

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        for block in self.children():
            x = block(x)
        flat = x.flatten(1)
        return flat if flat.shape[1] == self.num_features else x.mean((2, 3))


class Layers(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, weights: Arrays, activation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.activation = activation
        for name in dict.fromkeys(key.partition(".")[0] for key in weights):
            rows, columns = weights[f"{name}.weight"].shape
            self.add_module(name, nn.Linear(columns, rows, bias=f"{name}.bias" in weights))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all."""
        first, *others = self.children()
        x = first(x)
        for layer in others:
            x = layer(self.activation(x))
        return x


def network(case: Case, dtype: torch.dtype) -> nn.Module:
    """Build the network that the initial weights fit, with these weights."""
    weights = {name: v for name, v in case.initial.items() if not name.startswith("hyper/")}
    activation = torch.tanh if "tanh" in case.words() else F.relu
    is_flat = "head.weight" not in weights
    model = Layers(weights, activation) if is_flat else convolutional(case, weights)
    model.to(dtype)
    places = dict(model.named_parameters())
    if strange := sorted(places.keys() ^ weights.keys()):
        raise UnknownError(f"initial.npz and the network do not share {', '.join(strange)}")
    with torch.no_grad():
        for name, place in places.items():
            if place.shape != weights[name].shape:
                raise UnknownError(f"{name}: {list(weights[name].shape)} for {list(place.shape)}")
            place.copy_(torch.from_numpy(weights[name]))
    return model


def convolutional(case: Case, weights: Arrays) -> nn.Module:
    """Build raymaml's blocks and norms, and a linear head."""
    rows, num_features = weights["head.weight"].shape
    model = Classifier(Encoder(weights, block(case), num_features), num_features, rows)
    shift = next((value for name, value in weights.items() if name.endswith("norm.bias")), None)
    options = {"policy": "none"}
    if shift is not None:
        scaled = any(name.endswith("norm.weight") for name in weights)
        per_step = "affine" if shift.ndim == 2 else "none"
        options = {"policy": "transductive", "scale": scaled, "per_step": per_step}
    apply_policies(
        model,
        {"*": options},
        eps=case.number("eps", "norm_eps") or (1e-3 if "official" in case.methods else 1e-5),
        momentum=MOMENTUM,
        num_steps=case.steps if shift is None or shift.ndim == 1 else len(shift),
    )
    return model


def block(case: Case) -> type[nn.Module]:
    """Return the block: strided without a maximum, or leaky for MAML++ unless a setting differs."""
    text, pooling = case.words(), case.words("pooling")
    without = re.search(r"\bnone\b|\bno\b|without|false|strid", pooling)
    if (without and not re.match("2x2|max", pooling)) or (
        not pooling and re.search("strid|official.*omniglot", text)
    ):
        return StridedBlock
    if "leaky" in text or ("maml++" in case.methods and "relu" not in text):
        return LeakyBlock
    return ConvBlock


def loss_fn(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a set; the official code's is a sum divided by the shots."""
    if "support_x" in case.episodes:
        return F.mse_loss
    if "official" not in case.methods:
        return F.cross_entropy
    labels = case.episodes["support_labels"]
    shots = labels.shape[1] // len(np.unique(labels))
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum") / shots


def episodes(case: Case, dtype: torch.dtype) -> list[Episode]:
    """Return the episodes; images as bytes / 255."""
    found = {name: torch.from_numpy(value) for name, value in case.episodes.items()}
    sets = {
        f"{part}_{ours}": value.to(dtype) / 255 if theirs == "images" else value
        for part in ("support", "query")
        for ours, theirs in (("x", "images"), ("y", "labels"), ("x", "x"), ("y", "y"))
        if (value := found.get(f"{part}_{theirs}")) is not None
    }
    sets = {n: v.to(dtype) if v.is_floating_point() else v for n, v in sets.items()}
    if "batches" in found:
        sets["support_batches"] = found["batches"]
    return [Episode(**{n: v[e] for n, v in sets.items()}) for e in range(len(sets["query_x"]))]
