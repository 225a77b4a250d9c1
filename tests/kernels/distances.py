"""How far each way to the meta-gradient is from float64, over episodes of noise, with their ties.

    python tests/kernels/distances.py EPISODES > raymaml/kernels/distances.txt

A maximum or a ReLU that rounding tips over moves a gradient by up to 1e-2, in any implementation.
``moved`` is float64 itself, each weight moved by half a rounding of float32.
"""

from __future__ import annotations

import copy
import statistics
import sys

import click
import torch

from raymaml.config.inner import InnerConfig
from raymaml.config.model import ModelConfig
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.models.heads import Classifier
from raymaml.types import Episode

CASES = {  # pixels, channels of images, shots, width
    "28x28, 1 shot, 64 channels": (28, 1, 1, 64),
    "84x84, 1 shot, 32 channels": (84, 3, 1, 32),
}
WAYS = {
    "plain graph": ("unrolled", False),
    "mixed_mode without kernels": ("mixed_mode", False),
    "mixed_mode by kernels": ("mixed_mode", True),
}


def drawn(seed: int, size: int, channels: int, shots: int, dtype: torch.dtype) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    sets = {}
    for name, count in (("support", shots), ("query", 15)):
        images = torch.randn(5 * count, channels, size, size, generator=generator)
        sets |= {
            f"{name}_x": images.to(dtype),
            f"{name}_y": torch.arange(5).repeat_interleave(count),
        }
    return Episode(**sets)


def gradient(model: Classifier, episode: Episode, method: str, *, kernels: bool) -> torch.Tensor:
    inner = InnerConfig(num_steps=5, lr=0.01, gradient=method)
    learner = MetaLearner(model, inner, channels_last=method == "mixed_mode", kernels=kernels)
    grads = learner.episode_gradient(episode).grads
    return torch.cat([grads[name].double().flatten() for name in learner.params])


def moved(model: Classifier, seed: int) -> Classifier:
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.mul_(1 + torch.finfo(torch.float32).eps / 2 * noise)
    return other


def main(count: int) -> None:
    torch.set_num_threads(1)
    for title, (size, channels, shots, width) in CASES.items():
        errors: dict[str, list[float]] = {}
        for seed in range(count):
            shape = (channels, size, size)
            model = build_model(ModelConfig(width=width), image_shape=shape, num_ways=5, seed=seed)
            exact, precise = copy.deepcopy(model).double(), torch.float64
            episode = drawn(seed, size, channels, shots, precise)
            wanted = gradient(exact, episode, "unrolled", kernels=False)
            found = {"moved": gradient(moved(exact, seed), episode, "unrolled", kernels=False)}
            single = drawn(seed, size, channels, shots, torch.float32)
            for name, (method, kernels) in WAYS.items():
                found[name] = gradient(model, single, method, kernels=kernels)
            for name, value in found.items():
                error = float((value - wanted).norm() / wanted.norm())
                errors.setdefault(name, []).append(error)
        click.echo(f"{title}: {count} episodes, 5 ways, 15 queries, 5 inner steps")
        for name, each in errors.items():
            near = sum(error < 1e-5 for error in each)
            click.echo(
                f"  {name:<28} median {statistics.median(each):.1e}  largest {max(each):.1e}"
                f"  within 1e-5: {near}"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
