"""The test of one run: the model, and the baselines that show what it learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from raymaml.config.schema import Config
from raymaml.evaluation.arm import CODE, Arm, Shared
from raymaml.evaluation.campaign import Campaign
from raymaml.training.checkpoint import find_checkpoints
from raymaml.training.origin import require_of_its_run, require_same_model

_HOW = {"model": "adapted", "cosine": "by cosine similarity"}
"""``evaluation.head`` in words."""


def plan_test(config: Config, device: torch.device) -> Campaign:
    """Plan the campaign of `raymaml test`.

    Raises:
        UserError: the run has no checkpoint, or test episodes are missing or do not fit.
    """
    arms = _arms(config, device)
    # every mistake is reported now, before any work
    for checkpoint in arms[0].checkpoints:
        ways = config.episodes.test.num_ways
        require_same_model(checkpoint, config.model, ways, arms[0].bank.image_shape)
    arms[0].build()
    return _campaign(*arms)


def plan_report(config: Config) -> Campaign:
    """Plan to report finished records of any versions and any source of the encoder.

    It builds no model and imports no encoder.

    Raises:
        UserError: as ``plan_test``; or episodes are not judged yet.
    """
    arms = _arms(config, torch.device("cpu"), code={})
    chunk_size = config.evaluation.chunk_size
    return _campaign(*(_as_recorded(arm, chunk_size) for arm in arms)).require_finished()


def _as_recorded(arm: Arm, chunk_size: int) -> Arm:
    """Return ``arm`` with the code of its newest finished records, or else of its newest ones."""
    recorded = [
        replace(arm, code={key: identity[key] for key in CODE if key in identity})
        for identity in arm.of_any_code()
    ]
    finished = [each for each in recorded if not each.missing(chunk_size)]
    return next(iter([*finished, *recorded]), arm)


def _campaign(model: Arm, *baselines: Arm) -> Campaign:
    folder = model.folder.parent
    return Campaign(
        name=model.config.name,
        folder=folder,
        records=folder,
        arms=(model, *baselines),
        chunk_size=model.config.evaluation.chunk_size,
    )


def _arms(config: Config, device: torch.device, code: Mapping[str, str] | None = None) -> list[Arm]:
    """Return the arms of a test: the model, and the baselines that show what it learned."""
    evaluation, count = config.evaluation, config.episodes.test.num_episodes
    checkpoints = find_checkpoints(config.run_folder, evaluation.checkpoint)
    for checkpoint in checkpoints:
        require_of_its_run(checkpoint)
    which = f"{evaluation.checkpoint} checkpoint"
    if evaluation.checkpoint == "ensemble":
        which = f"mean of the logits of the best checkpoints, {len(checkpoints)} kept"
    how = _HOW[evaluation.head]
    model = Arm(
        name="model",
        description=f"{which}, {how}",
        config=config,
        checkpoints=checkpoints,
        num_episodes=count,
        target_half_width=evaluation.target_half_width,
        folder=config.run_folder / "test" / "model",
        shared=Shared(device),
        code=code,
    )

    def baseline(name: str, description: str, **changes: Any) -> Arm:
        return replace(
            model,
            name=name,
            description=description,
            num_episodes=min(evaluation.baseline_episodes, count),
            folder=model.folder.with_name(name),
            **changes,
        )

    found = [model]
    if evaluation.baseline_episodes:
        found.append(baseline("untrained", f"initial weights, {how} alike", checkpoints=()))
    # other heads are at chance without a step, and a model without steps is judged already
    if found[1:] and config.model.head == "learned" and config.test_inner.num_steps > 0:
        inner = evaluation.inner.model_copy(update={"num_steps": 0})
        update = {"evaluation": evaluation.model_copy(update={"inner": inner})}
        still = config.model_copy(update=update)
        found.append(baseline("no-adaptation", "trained weights, no inner step", config=still))
    return found
