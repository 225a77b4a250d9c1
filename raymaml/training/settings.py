"""Settings of a run and its processes: meta-gradient, memory layout, device, precision, threads."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

import torch

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.config.model import ENCODERS, ModelConfig
from raymaml.config.norm import BY_THE_BATCH
from raymaml.config.schema import ClusterConfig
from raymaml.kernels.library import MOST_THREADS, WIDTHS, Kernels, usable

WORTH_IT = {"convnet4": 150_000}
"""Activations of the first layer, over a support set, from which on mixed_mode is faster..."""
WORTH_IT_ELSEWHERE = 1_000_000
"""...also in resnets. Below, PyTorch spends its time in calls, and mixed_mode makes more."""
IN_CLOSED_FORM = "2 to 3x"
"""How much longer ConvNet4 takes without the kernels, in training and evaluation..."""
BY_CONVOLUTIONS = {
    "convnet4": "1.1 to 1.5x",
    **dict.fromkeys(("resnet12", "resnet18", "resnet10"), "1.3 to 1.6x"),
}
"""...and models that use them for convolutions alone: measured of ConvNet4 with norms that do not
go by the batch, and of resnets."""
METHODS_OF_LITTLE_MEMORY = {
    *("checkpointed", "mixed_mode", "first_order", "reptile", "implicit", "plain")
}
"""They keep one inner step."""
FEW_STEPS = 10
"""Inner steps up to which the graph of such small images is small as well."""
FEW_STEPS_ON_GPU, LITTLE_ON_GPU = 5, 2_000_000
"""Inner steps, and activations of the first layer over a support set, up to which unrolled is
faster on a GPU: measured of 5 steps on an H200, of 1 and 5 shots."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEEP = 1 << 30
MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(_KEEP),
    "MALLOC_MMAP_THRESHOLD_": str(_KEEP),
    "MALLOC_ARENA_MAX": "1",
}
"""The same settings for a process that is yet to start: a worker of Ray has many threads, each with
a heap of its own, before our code runs in it."""


def gradient_method(
    inner: InnerConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    support_shape: tuple[int, int, int, int],
    device: torch.device,
) -> str:
    """Return the method of the meta-gradient: the one asked for, or the fastest one measured.

    ``mixed_mode`` by kernels, where the model has some, and else for encoders of raymaml with norms
    that have closed rules, unless images are so few and small that the plain graph is faster. On a
    GPU ``mixed_mode`` for all resnets, and for several episodes at once in closed form, which was
    not measured there: an episode moves half the bytes of ``unrolled``. ``checkpointed``, which
    needs no rules but PyTorch's and has a memory as flat, for all that was not measured or where it
    was faster; of a single step there is nothing to save, and the plain graph does.

    Args:
        inner: the inner loop.
        model: encoder and norm decide.
        cluster: the memory layout decides.
        support_shape: of the images of a support set, [S, C, H, W].
        device: to learn on.
    """
    if inner.gradient != "auto":
        return inner.gradient
    loss = _loss_without_kernels(model, cluster, device)
    if loss == IN_CLOSED_FORM and _no_kernels(cluster) is None:
        return "mixed_mode"
    known = model.encoder in ENCODERS and model.norm_policies <= BY_THE_BATCH
    on_gpu = device.type != "cpu"
    if not known or not (on_gpu or image_layout(cluster, device) == "channels_last"):
        return "unrolled" if inner.num_steps <= 1 else "checkpointed"  # one step: nothing to save
    support, _, height, width = support_shape
    activations = support * height * width * model.stage_widths[0]
    if on_gpu:
        if _in_batched_closed_form(model, cluster):
            return "mixed_mode"
        few = inner.num_steps <= FEW_STEPS_ON_GPU and activations <= LITTLE_ON_GPU
        return "unrolled" if few and model.encoder == "convnet4" else "mixed_mode"
    worth_it = activations >= WORTH_IT.get(model.encoder, WORTH_IT_ELSEWHERE)
    return "mixed_mode" if worth_it or inner.num_steps > FEW_STEPS else "unrolled"


def kernels_in_use(model: ModelConfig, cluster: ClusterConfig, device: torch.device) -> bool:
    """Return whether a model uses the kernels on this machine; the first call builds them."""
    return _loss_without_kernels(model, cluster, device) != "" and _no_kernels(cluster) is None


def kernels_line(
    models: Sequence[ModelConfig], cluster: ClusterConfig, device: torch.device
) -> str:
    """Return words on the kernels for the settings; empty if they are for none of the models."""
    losses = [loss for model in models if (loss := _loss_without_kernels(model, cluster, device))]
    if not losses:
        return ""
    reason = _no_kernels(cluster)
    words = "kernels" if reason is None else f"kernels: none, {reason}; {losses[0]} slower here"
    return f", {words}"


def _loss_without_kernels(model: ModelConfig, cluster: ClusterConfig, device: torch.device) -> str:
    """Return how much longer a model takes without the kernels; empty if they are not for it."""
    if cluster.precision != "float32" or device.type != "cpu":
        return ""
    if any(width % WIDTHS for width in model.stage_widths):
        return ""
    return IN_CLOSED_FORM if _has_closed_form(model) else BY_CONVOLUTIONS.get(model.encoder, "")


def _in_batched_closed_form(model: ModelConfig, cluster: ClusterConfig) -> bool:
    """Return whether several episodes at once have the closed form of ``kernels/batched.py``."""
    asked = cluster.kernels != "off" and cluster.episodes_per_chunk != 1
    return _has_closed_form(model) and asked and cluster.precision != "bf16"


def _has_closed_form(model: ModelConfig) -> bool:
    return model.encoder == "convnet4" and model.norm_policies <= BY_THE_BATCH


def _no_kernels(cluster: ClusterConfig) -> str | None:
    """Return why a process has no kernels; None: it has them."""
    if cluster.kernels == "off":
        return "cluster.kernels is off"
    if cluster.threads_per_worker > MOST_THREADS:
        return f"they run on one thread, and workers have {cluster.threads_per_worker}"
    found = usable(torch.float32)
    return None if isinstance(found, Kernels) else str(found)


def image_layout(cluster: ClusterConfig, device: torch.device) -> str:
    """Return the memory layout of images: ``channels_last`` or ``contiguous``."""
    if cluster.memory_format != "auto":
        return cluster.memory_format
    return "channels_last" if device.type == "cpu" else "contiguous"


def at_once_line(cluster: ClusterConfig, device: torch.device) -> str:
    """Return words on the episodes at once for the settings; empty if they are one by one."""
    number = cluster.episodes_per_chunk
    if number == "auto":
        return "" if device.type == "cpu" else ", as many episodes at once as memory allows"
    return f", {number} episodes at once" if number > 1 else ""


def workers_line(clusters: Sequence[ClusterConfig], device: torch.device, num_workers: int) -> str:
    """Return a line on workers that use all these settings; the first decides on processes."""
    words = [f"{num_workers} GPU worker(s)"]
    if device.type != "cuda":
        memory = "freed memory is kept" if clusters[0].keep_freed_memory else "default allocator"
        threads = f"of {clusters[0].threads_per_worker} thread(s)"
        words = [f"{num_workers} CPU worker(s) {threads}", memory]
    layouts = dict.fromkeys(image_layout(cluster, device) for cluster in clusters)
    precisions = dict.fromkeys(cluster.precision for cluster in clusters)
    return ", ".join([*words, " and ".join(layouts), " and ".join(precisions)])


def local_device(cluster: ClusterConfig) -> torch.device:
    """Return the device of a lone process.

    Raises:
        UserError: cuda is asked for and there is none, or the device has not the precision.
    """
    available = torch.cuda.is_available()
    if cluster.device == "cuda" and not available:
        raise UserError(
            "cluster.device is cuda but this process sees no GPU",
            remedy="set cluster.device to cpu or auto",
        )
    use_gpu = available and cluster.device != "cpu"
    require_precision(cluster, use_gpu)
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def require_precision(cluster: ClusterConfig, use_gpu: bool) -> None:
    """Check that the device has the precision.

    Raises:
        UserError: tf32 is asked for on a CPU.
    """
    if cluster.precision == "tf32" and not use_gpu:
        raise UserError(
            "cluster.precision is tf32, which GPUs alone have, and there is none to be used",
            remedy="use float32 or bf16",
        )


def prepare_process(cluster: ClusterConfig, device: torch.device) -> None:
    """Set precision of a process on a GPU; threads, and to keep freed memory, of one on CPU.

    glibc returns large blocks to the kernel at each free and pays a page fault for each page at the
    next allocation: more than the arithmetic of small images. Below these thresholds it does not,
    provided that all threads share one heap: those of other threads are at most 64 MB each, and
    shrink. Other C libraries are left as they are.
    """
    if device.type != "cpu":
        set_precision(cluster)
        set_determinism(cluster)
        return
    torch.set_num_threads(cluster.threads_per_worker)
    if sys.platform == "linux" and cluster.keep_freed_memory:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEEP)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
            mallopt(_M_ARENA_MAX, 1)


def set_determinism(cluster: ClusterConfig) -> None:
    """Let GPUs take deterministic kernels alone, if the configuration says so."""
    if cluster.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def set_precision(cluster: ClusterConfig) -> None:
    """Let GPUs multiply in TF32 where the configuration says so, and else in float32."""
    torch.backends.cuda.matmul.allow_tf32 = cluster.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = cluster.precision == "tf32"
