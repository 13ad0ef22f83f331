"""A model and its deployed artefact with one interface, so that the user's `evaluate` is called alike with both.

    tensors, as the model takes them -> arrays -> session of the artefact -> arrays -> tensors, as the model gives them

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, open_artifact
from muntin.artifact.store import with_precision
from muntin.deployment.capture.model_contract import as_bytes
from muntin.deployment.capture.named_graph import as_arrays, usual_axes
from muntin.deployment.export import check_pixels, export, infer_signature
from muntin.errors import ExportError, MuntinError
from muntin.models.eager import ModelInputs, as_input, batch_rows, call, first_row
from muntin.runtime import load
from muntin.runtime.profiling.timing import interleaved_latency

EXAMPLE_ROWS = 4
"""Rows of a batch from which golden pairs are made."""
TIMED_S, LEAST_ROUNDS, MOST_ROUNDS = 1.0, 10, 100
"""About the seconds that a measurement of latency takes, and its number of rounds."""


class NamedAnswers(dict[str, Tensor]):
    """Tensors by name, which are also attributes: `answer["logits"]` is `answer.logits`."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a model is called: with images, or with tensors by the names of its `forward`.

    `signature`: of images; None for named tensors. `axes`: free dimensions of each named tensor. `answer`: what the model returns.
    """

    signature: Signature | None
    names: tuple[str, ...] = ()
    axes: Mapping[str, Sequence[str | None]] | None = None
    answer: Literal["tensor", "tuple", "names"] = "tensor"

    def named(self, batch: ModelInputs, model: nn.Module | None = None) -> dict[str, Tensor]:
        """A batch's tensors by the names of the inputs. Pixels alone become floats, as the model would get them."""
        if isinstance(batch, Mapping):
            return {name: batch[name] for name in self.names}
        if isinstance(batch, Tensor):
            return {self.names[0]: as_input(model, batch) if model is not None else batch.float()}
        return dict(zip(self.names, batch, strict=True))


def interface_of(model: nn.Module, batches: Sequence[ModelInputs], signature: Signature | None = None) -> Interface:
    """Find how a model is called, from its batches: images if they are raw pixels (B, C, H, W), 0-255, and the answer is one of scores.

    Dimensions of named tensors that differ between batches are free, and so is the first one if all inputs share it. Costs a call of the
    model. Raises `MuntinError` for batches with something else than tensors.
    """
    if signature is not None:
        return Interface(signature=signature)
    pixels = [batch for batch in batches if isinstance(batch, Tensor)]
    if len(pixels) == len(batches):
        try:
            for images in pixels:
                check_pixels(images, "calibration batch")
            return Interface(signature=infer_signature(model, pixels[0][:1]))
        except ExportError:  # numbers of another kind, or another answer
            pass
    first = batches[0]
    names = tuple(first) if isinstance(first, Mapping) else _positional(model, 1 if isinstance(first, Tensor) else len(first))
    with torch.no_grad():
        answer = call(model, first_row(first))
    kind: Literal["tensor", "tuple", "names"] = "tuple" if isinstance(answer, tuple | list) else "names"
    interface = Interface(signature=None, names=names, answer="tensor" if isinstance(answer, Tensor) else kind)
    named = [interface.named(batch, model) for batch in batches]
    for name, tensor in named[0].items():
        if not isinstance(tensor, Tensor):
            raise MuntinError(f"calibration: input '{name}' is a {type(tensor).__name__}: the artefact takes tensors; leave others out")
    return Interface(signature=None, names=names, axes=usual_axes(*named), answer=interface.answer)


def _positional(model: nn.Module, count: int) -> tuple[str, ...]:
    names = [
        name for name, entry in inspect.signature(model.forward).parameters.items()
        if entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    if len(names) < count:
        raise MuntinError(f"calibration: a batch holds {count} tensors, the model's forward names {len(names)}: give dictionaries")
    return tuple(names[:count])


def deploy(model: nn.Module, interface: Interface, example: ModelInputs, path: Path, *, exact: bool = False) -> None:
    """Write a model as an artefact, in the integers that it has. `example`: a batch of typical inputs. `exact`: float layers in 32 bits."""
    few = _first_rows(example, EXAMPLE_ROWS)
    if interface.signature is not None:
        assert isinstance(few, Tensor)
        artifact: Artifact = export(model, few, path, signature=interface.signature, progress=False)
    else:
        artifact = export(model, interface.named(few, model), path, axes=interface.axes, progress=False)
    if exact:
        with_precision(artifact, "f32")


class Deployed(nn.Module):
    """An artefact that is called as the model that it was made of: tensors in and out; `eval()` and `to()` change nothing.

    `session`: of the engine. The tensors of an answer are on the device of the first input. Images are rounded to bytes, as the artefact
    takes them.
    """

    def __init__(self, path: Path | str, interface: Interface, *, precision: str = "recorded", threads: int | None = None) -> None:
        super().__init__()
        self.path, self.interface = Path(path), interface
        self.session = load(path, precision=precision, threads=threads)

    def __enter__(self) -> Deployed:
        return self

    def __exit__(self, *error: object) -> None:
        self.session.close()

    @property
    def bytes(self) -> int:
        """Size of the whole artefact."""
        return open_artifact(self.path).bytes

    def forward(self, *inputs: Tensor, **by_name: Tensor) -> Any:
        interface = self.interface
        if interface.signature is not None:
            images_BCHW = next(iter((*inputs, *by_name.values())))
            return torch.from_numpy(self.session(_bytes(images_BCHW))).to(images_BCHW.device)
        given = dict(zip(interface.names, inputs, strict=False)) | by_name
        if missing := [name for name in interface.names if name not in given]:
            raise MuntinError(f"the artefact takes {', '.join(interface.names)}, and {', '.join(missing)} is missing")
        device = next(iter(given.values())).device
        given = {name: self._as_taken(name, given[name]) for name in interface.names}
        answers = {name: torch.from_numpy(array).to(device) for name, array in self.session(as_arrays(given)).items()}
        if interface.answer == "tensor":
            return next(iter(answers.values()))
        return tuple(answers.values()) if interface.answer == "tuple" else NamedAnswers(answers)

    def _as_taken(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the artefact's type: floats of any width, and pixels, as `call` casts them."""
        spec = next((spec for spec in self.session.signature.inputs if spec.name == name), None)
        return tensor if spec is None or spec.dtype != "float32" else tensor.float()

    def latency_ms(self, batch: ModelInputs) -> float:
        """Median milliseconds of a call of the session on the first row of a batch."""
        row = first_row(batch)
        interface = self.interface
        arrays: Any = _bytes(row) if interface.signature is not None else as_arrays(self._named(row))
        self.session(arrays)
        started = time.perf_counter()
        self.session(arrays)
        seconds = time.perf_counter() - started
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(TIMED_S / 2 / max(seconds, 1e-9))))
        return interleaved_latency({"artifact": self.session}, arrays, rounds=rounds)["artifact"].median_ms

    def _named(self, row: ModelInputs) -> dict[str, Tensor]:
        return {name: self._as_taken(name, tensor) for name, tensor in self.interface.named(row).items()}


def _bytes(images_BCHW: Any) -> Any:
    if not isinstance(images_BCHW, Tensor) or images_BCHW.ndim != 4:
        what = f"shape {tuple(images_BCHW.shape)}" if isinstance(images_BCHW, Tensor) else f"type {type(images_BCHW).__name__}"
        raise MuntinError(f"images of {what}: the artefact takes a tensor of raw pixels (B, C, H, W), as calibration has them")
    return as_bytes(images_BCHW.detach().cpu())


def _first_rows(batch: ModelInputs, rows: int) -> ModelInputs:
    total = batch_rows(batch)

    def cut(part: Any) -> Any:
        return part[:rows] if isinstance(part, Tensor) and part.ndim and len(part) == total else part

    if isinstance(batch, Tensor):
        return batch[:rows]
    return {name: cut(part) for name, part in batch.items()} if isinstance(batch, Mapping) else tuple(cut(part) for part in batch)
