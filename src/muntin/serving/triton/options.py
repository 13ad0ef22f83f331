"""Options of a model in a Triton repository."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions

Backend = Literal["python", "onnxruntime", "openvino", "tensorrt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class TritonOptions(BaseModel):
    """Options of `muntin triton`. Each field states its unit and range. Raises DataError for an unknown engine or precision.

    `backend`: "python" runs the artefact in muntin; the others run its ONNX file in Triton's own engines. `engine`, `precision`, `sizes`,
    `dims` and `objective_ms` are of "python": muntin's own session is measured for an objective.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="of the model")]
    version: Annotated[int, Field(ge=1, le=2**31 - 1, description="folder of the version")] = 1
    backend: Backend = "python"
    objective_ms: Annotated[float | None, Field(gt=0, description="of batching; None: requests wait for no others")] = None
    max_batch: Annotated[int, Field(ge=1, le=1024, description="rows (images) of a batch")] = 8
    instances: Annotated[int, Field(ge=1, le=1024, description="copies of the model that compute at the same time")] = 1
    threads: Annotated[int | None, Field(ge=1, description="of each instance; None: the usable physical cores, divided")] = None
    engine: str = DEFAULT_ENGINE
    precision: str = "recorded"
    sizes: Annotated[
        tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...],
        Field(max_length=32, description="(height, width) of images to compile for, beside the exported size"),
    ] = ()
    dims: Annotated[
        tuple[dict[str, Annotated[int, Field(ge=1)]], ...],
        Field(max_length=32, description="sizes of the free dimensions of named tensors to compile for, without the batch"),
    ] = ()

    def session(self, cores: int) -> SessionOptions:
        """Return the options with which each instance opens the artefact on a machine of so many physical cores."""
        threads = self.threads or max(1, cores // self.instances)
        return SessionOptions(engine=self.engine, precision=self.precision, threads=threads, dynamic=True)

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        own = ("objective_ms", "engine", "precision", "sizes", "dims")
        given = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if self.backend != "python" and given:
            raise ValueError(f"{given[0]} is of the back end python, and this is {self.backend}: leave it out")
        self.session(cores=1)
        return self
