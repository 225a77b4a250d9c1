"""The norm policies by name, and how a model gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from raymaml.common.errors import UserError, did_you_mean
from raymaml.common.patterns import first_match
from raymaml.config.explain import validated
from raymaml.config.norm import NormOptions
from raymaml.layers import PassAware, plain_places, tracking_norms
from raymaml.models import norm as norms

POLICIES: Mapping[str, Callable[[int, float, float], PassAware]] = {
    "transductive": norms.TransductiveNorm2d,
    "running": norms.RunningNorm2d,
    "episodic": norms.EpisodicNorm2d,
    "episodic_biased": norms.BiasedEpisodicNorm2d,
    "context": norms.ContextNorm2d,
    "tasknorm_i": norms.TaskNorm2d,
    "tasknorm_l": norms.LayerTaskNorm2d,
    "tasknorm_reference": norms.ReferenceTaskNorm2d,
    "instance": norms.InstanceNorm2d,
    "layer": norms.LayerNorm2d,
    "none": norms.NoNorm2d,
}
"""The policies of ``model.norm`` by name: (channels, eps, momentum) -> layer."""
_WITH_ROWS = {
    "none": (),
    "affine": ("weight", "bias"),
    "running": ("mean", "var", "kept"),
    "both": ("weight", "bias", "mean", "var", "kept"),
}
"""Names of the tensors that have a row for each inner step, by ``per_step``."""
_OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def apply_policies(
    model: nn.Module,
    norm: Mapping[str, str | NormOptions | Mapping[str, Any]],
    *,
    eps: float,
    momentum: float,
    num_steps: int = 1,
) -> None:
    """Replace every ``nn.BatchNorm2d`` by a norm of the chosen policy, which takes its weights.

    Args:
        model: changed in place.
        norm: policy by name pattern, or a policy with options ({"policy": ..., "per_step": ...});
            the first that matches a layer counts.
        eps: added to the variance, in all layers.
        momentum: weight of the newest batch in accumulated moments, in all layers.
        num_steps: T, the rows of what ``per_step`` gives each inner step.

    Raises:
        UserError: ``norm`` is no mapping from patterns to policies, a pattern matches no norm
            layer, a layer has no policy, does more than ``nn.BatchNorm2d`` or is held in a plain
            attribute or container, there is nothing to replace though ``norm`` is not ``none``, or
            other norms keep moments, which would leak from episode to episode.
    """
    options = _options(norm)
    named = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in named.items() if isinstance(m, nn.BatchNorm2d)}
    if held := [n for n, m in plain_places(model).items() if isinstance(m, nn.BatchNorm2d)]:
        raise UserError(
            f"model.encoder: {', '.join(held)} are norms in a plain attribute or container, where"
            " model.norm replaces none",
            remedy="hold them as submodules alone, in an nn.ModuleList or an nn.Sequential",
        )
    if strange := [name for name in tracking_norms(model) if name not in layers]:
        raise UserError(
            f"model.encoder: {', '.join(strange)} keep moments from episode to episode",
            remedy="use nn.BatchNorm2d, which model.norm replaces, or a norm without moments",
        )
    if not layers:
        if {each.policy for each in options.values()} != {"none"}:
            raise UserError(
                "model.norm: the encoder has no nn.BatchNorm2d that it could replace",
                remedy="set it to none, so that results say so",
            )
        return
    if problems := [problem for name, m in layers.items() if (problem := _more_than(name, m))]:
        raise UserError(*problems)
    new: dict[nn.BatchNorm2d, PassAware] = {}  # a layer may stand at several places
    for name, chosen in first_match("model.norm", options, list(layers)).items():
        layer = layers[name]
        if layer not in new:
            made = POLICIES[chosen.policy](layer.num_features, eps, momentum)
            new[layer] = _converted(layer, made, chosen, num_steps)
        model.set_submodule(name, new[layer])


def _options(norm: object) -> dict[str, NormOptions]:
    if not isinstance(norm, Mapping):
        raise UserError(
            f"model.norm: {norm!r} is no mapping from name patterns to policies",
            remedy=f"give {{'*': {norm!r}}} for all layers",
        )
    for policy in norm.values():
        if not isinstance(policy, NormOptions | Mapping) and policy not in POLICIES:
            raise UserError(
                f"model.norm: {policy!r} is no policy",
                remedy=f"there are {', '.join(POLICIES)}{did_you_mean(str(policy), POLICIES)}",
            )
    return {
        pattern: validated(
            NormOptions, {"policy": each} if isinstance(each, str) else dict(each), "model.norm"
        )
        for pattern, each in norm.items()
    }


def _more_than(name: str, layer: nn.BatchNorm2d) -> str:
    """Name the additions of a layer to batch norm, which a policy in its place would lose."""
    held = [*layer._parameters, *layer._buffers, *layer._modules]
    own = [key for key in held if key not in _OF_BATCH_NORM]
    own += [
        key
        for key, value in vars(layer).items()
        if callable(value) or (key.endswith("_hooks") and value)
    ]
    if type(layer) is not nn.BatchNorm2d:
        own = [f"{type(layer).__module__}.{type(layer).__qualname__}"]
    if not own:
        return ""
    return (
        f"model.encoder: {name} is an nn.BatchNorm2d that does more ({', '.join(own)}); a norm"
        " policy in its place would lose that; use a plain nn.BatchNorm2d, and a module of its own"
        " behind it for the rest, such as an activation"
    )


def _converted(
    layer: nn.BatchNorm2d, new: PassAware, options: NormOptions, num_steps: int
) -> PassAware:
    """Give the policy's layer ``new`` what ``layer`` holds."""
    if not isinstance(new, norms.ScaledNorm2d):
        return new
    for name in ("weight", "bias"):
        if (own := getattr(layer, name)) is not None:
            setattr(new, name, own)
        else:  # a constant 1 or 0, which neither adapts nor learns
            getattr(new, name).requires_grad_(False)
    if not options.scale:
        new.weight = None
    if layer.track_running_stats and isinstance(new, norms.RunningNorm2d):
        new.mean, new.var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    for name in _WITH_ROWS[options.per_step]:
        if (value := getattr(new, name)) is not None:
            rows = value.detach().repeat(num_steps, 1)
            is_learned = isinstance(value, nn.Parameter)
            setattr(new, name, nn.Parameter(rows, value.requires_grad) if is_learned else rows)
    return new
