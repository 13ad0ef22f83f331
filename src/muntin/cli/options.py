"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ArtifactArgument = Annotated[Path, typer.Argument(help="An artefact's folder, written by `muntin export`.")]
CheckpointArgument = Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")]
EngineOption = Annotated[str, typer.Option(help="openvino, onnxruntime, onnxruntime-cuda or onnxruntime-tensorrt.")]
PrecisionOption = Annotated[str, typer.Option(help="Precision of the float layers: recorded, f32, bf16 or f16.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; the usable physical cores by default.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-code", help="Import and call package.module:function, where the recipe of a run names it as its model."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last output.")]
