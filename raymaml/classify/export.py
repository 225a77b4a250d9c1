"""The adapted network for other programs: pixels in, probabilities out; ONNX or torch.export."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from raymaml.classify.adaptation import Adaptation, Pixels
from raymaml.common.errors import UserError
from raymaml.data.loader import scale_and_shift
from raymaml.layers import OwnRules, PassAware
from raymaml.storage.files import exists, replacing
from raymaml.storage.place import Place

TOLERANCE = 1e-5
"""The largest difference of a probability from that of the classifier."""
Run = Callable[[Pixels], NDArray[np.float32]]


class _Network(nn.Module):
    """Pixels, uint8 ``[B, H, W, C]``, -> probabilities ``[B, N]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, adaptation: Adaptation) -> None:
        super().__init__()
        self.model = _adapted_model(adaptation)
        how = adaptation.trained.preprocessing
        scale, shift = scale_and_shift(how.mean, how.std, torch.device("cpu"))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify."""
        images = pixels.movedim(-1, 1).to(torch.float32) * self.scale + self.shift
        probabilities: Tensor = self.model(images).softmax(1)
        return probabilities


def export(adaptation: Adaptation, classes: NDArray[Any], place: Place) -> None:
    """Write the adapted network, after a check that it gives the classifier's probabilities.

    Its input, ``pixels``, is uint8 [B, H, W, C] for any B, as ``Preprocessing.pixels`` gives it.
    Its output is float32 [B, N]. The labels are in the file, as a JSON list named ``classes`` (in
    a pt2 ``classes.json``).

    Raises:
        UserError: the file exists or has another suffix, onnx is not installed, the model is
            transductive, or the probabilities differ by more than ``TOLERANCE``.
    """
    if place.suffix not in (".onnx", ".pt2"):
        raise UserError(f"export: {place} is neither .onnx nor .pt2", remedy="give such a name")
    if exists(place):
        raise UserError(f"export: {place} exists", remedy="give another name")
    if adaptation.is_transductive:
        raise UserError(
            "export: model.norm is transductive, and a network answers for each image alone",
            remedy="train with model.norm: context",
        )
    channels, height, width = adaptation.trained.preprocessing.image_shape
    noise = np.random.default_rng(0).integers(0, 256, (5, height, width, channels), dtype=np.uint8)
    example = (torch.from_numpy(noise),)
    shapes = ({0: Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(_Network(adaptation), example, dynamic_shapes=shapes)
    labels = json.dumps(classes.tolist())
    write = _onnx if place.suffix == ".onnx" else _pt2
    content, run = write(program, example, labels)
    _require_equal(adaptation, run, noise)
    with replacing(place) as file:
        file.write(content)


def _adapted_model(adaptation: Adaptation) -> nn.Module:
    """Return a copy of the model that holds adapted weights and moments, ready for queries."""
    fast = adaptation.fast
    model = copy.deepcopy(adaptation.trained.learner.model).cpu().eval()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    new = {
        id(params[name]): nn.Parameter(value.cpu(), False) for name, value in fast.params.items()
    }
    new_buffers = {id(buffers[name]): value.cpu() for name, value in fast.buffers.items()}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[key] = new[id(parameter)]
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[key] = new_buffers[id(buffer)]
        if isinstance(module, OwnRules):
            module.rules = "torch"
        if isinstance(module, PassAware):
            module.current_pass, module.inner_step = "query", fast.last_step
    return model


def _pt2(program: ExportedProgram, example: tuple[Tensor], labels: str) -> tuple[bytes, Run]:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"classes.json": labels})
    content.seek(0)
    loaded = torch.export.load(content).module()
    return content.getvalue(), lambda pixels: loaded(torch.from_numpy(pixels)).numpy()


def _onnx(program: ExportedProgram, example: tuple[Tensor], labels: str) -> tuple[bytes, Run]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx asks for it late, in a long message)
    except ImportError as error:
        raise UserError(
            f"export: {error.name} is not installed", remedy="pip install raymaml[onnx]"
        ) from None
    found = torch.onnx.export(
        program,
        example,
        input_names=["pixels"],
        output_names=["probabilities"],
        dynamo=True,
        verbose=False,
    )
    assert found is not None
    found.model.metadata_props["classes"] = labels
    content = found.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda pixels: session.run(None, {"pixels": pixels})[0]


def _require_equal(adaptation: Adaptation, run: Run, pixels: Pixels) -> None:
    for some in (pixels, pixels[:1]):
        difference = np.abs(run(some) - adaptation.probabilities(some)).max()
        if not difference <= TOLERANCE:
            raise UserError(
                f"export: probabilities differ by {difference:.1e} from those of the classifier,"
                f" more than {TOLERANCE}",
                remedy="set cluster.precision: float32",
            )
