"""Errors that are no defect, explained: one message that names the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from raymaml.common.errors import UserError, storage_error
from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.config.schema import ClusterConfig
from raymaml.meta.learner import MetaLearner
from raymaml.storage.place import Place
from raymaml.training.agreement import check_gradient, made_up_episode
from raymaml.training.session import Session
from raymaml.training.settings import METHODS_OF_LITTLE_MEMORY
from raymaml.types import Params

_NO_MEMORY = ("DefaultCPUAllocator", "allocate memory", "not enough memory", "out of memory")
"""Messages of PyTorch's allocators, in a ``RuntimeError`` on CPU."""
_NO_MEMORY_FOR_CODE = "could not create a primitive"
"""The whole message of oneDNN where it gets no memory for a kernel."""


@contextlib.contextmanager
def explained(
    folder: Place,
    cluster: ClusterConfig,
    method: str = "",
    require: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Turn errors of memory and storage that the block raises into messages for the user.

    Such an error would come again, so it is not retried. A process that the kernel or Ray kills for
    its memory is retried: its neighbours may have taken the memory.

    Args:
        folder: of the run.
        cluster: the remedies depend on it.
        method: of the meta-gradient; "plain" in a pretraining; empty in evaluation, which has none.
        require: raises a ``UserError`` when data were altered, which explains any other error.

    Raises:
        UserError: instead of such an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        require()
        problem: UserError | None = storage_error(error) if isinstance(error, OSError) else None
        if problem is None and is_out_of_memory(error):
            problem = UserError(_memory_problem(folder, cluster, error, method))
        if problem is None:
            raise
        raise problem from error


def require_exact(
    learner: MetaLearner,
    model: ModelConfig,
    image_shape: tuple[int, int, int],
    num_ways: int,
    session: Session,
) -> None:
    """Check that the method of the meta-gradient is right for an own encoder.

    The workers share their results, so that none continues or waits alone.

    Raises:
        UserError: it disagrees with ``unrolled``, or the encoder lacks a derivative, on any worker.
    """
    # tests compare all methods on raymaml's own, and without inner steps there is one method
    if model.encoder in ENCODERS or learner.inner.num_steps == 0:
        return
    problem: Exception | None = None
    try:
        check_gradient(learner, made_up_episode(image_shape, num_ways, session.device))
    except Exception as error:  # raised once the others know
        problem = error
    flag = torch.full((1, 1), float(problem is not None), device=session.device)
    failed = session.gather(flag, [1] * session.world_size).flatten().nonzero().flatten().tolist()
    if problem is not None:
        raise problem
    if failed:
        raise UserError(
            f"inner.gradient: the comparison with unrolled failed on worker {failed[0]} and not on"
            f" worker {session.rank}",
            remedy=f"the log of worker {failed[0]} says why",
        )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed, on CPU or GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        any(words in text for words in _NO_MEMORY) or text.strip() == _NO_MEMORY_FOR_CODE
    )


def _memory_problem(folder: Place, cluster: ClusterConfig, error: Exception, method: str) -> str:
    """Return the message: changes that let the run go on, and those that make it another run."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no memory")
    plain, split = method == "plain", "train" if method else "test"
    to_resume = {
        "set a smaller cluster.num_workers": cluster.num_workers != 1,
        "take a machine with more memory": True,
    }
    under_another_name = {
        "inner.gradient: checkpointed": method and method not in METHODS_OF_LITTLE_MEMORY,
        "a smaller cluster.episodes_per_chunk": (
            method and not plain and cluster.episodes_together > 1
        ),
        "a smaller pretrain.slice_size": plain,
        f"fewer episodes.{split}.num_queries": not plain,
        "a smaller model or data.image_size": True,
    }
    return (
        f"{folder}: out of memory ({reason.rstrip('.')}); what is finished is kept;"
        f" {' or '.join(text for text, helps in to_resume.items() if helps)} and run the same"
        " command; or, under another name,"
        f" {', '.join(text for text, helps in under_another_name.items() if helps)}"
    )


class NotFiniteError(UserError):
    """A loss or gradient is not finite: learning cannot go on."""


def finite_rows(outcomes: Params) -> Tensor:
    """Return whether all outcomes of an episode, by name ``[E, ...]``, are finite: ``[E]``."""
    return torch.stack(
        [
            each.flatten(1).isfinite().all(1) if each.ndim > 1 else each.isfinite()
            for each in outcomes.values()
        ]
    ).all(0)


def require_finite(
    finite: Tensor, what: str, *, step: int, of: Sequence[str], section: str
) -> None:
    """Check that the outcomes of all episodes are finite.

    Args:
        finite: of ``finite_rows``, which all workers have alike.
        what: name of the numbers, such as "a loss or gradient".
        step: of the outer loop.
        of: names of the episodes.
        section: of the configuration, which the remedy names.

    Raises:
        NotFiniteError: naming the first episode with an outcome that is not finite.
    """
    if not finite.all():
        rates = "inner.lr, outer.lr or outer.rule_lr" if section == "outer" else f"{section}.lr"
        raise NotFiniteError(
            f"outer step {step}: {of[int((~finite).nonzero()[0, 0])]} gave {what}"
            " that is not finite",
            remedy=f"the last checkpoint is kept; lower {rates}, or set"
            f" {section}.clip_norm, under another name",
        )
