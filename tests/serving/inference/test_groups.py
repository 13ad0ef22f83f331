"""Batches of named tensors: joined, computed in parts when memory is short, and compared with a candidate's answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import MuntinError
from muntin.runtime.inputs import Dims, Named, check_inputs
from muntin.runtime.session import ExecutedLayer, Session
from muntin.serving.batching.job import Batch, Job
from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import Group
from muntin.serving.inference.recovery import Recovery
from muntin.serving.protocol.messages import InferInput, InferRequest
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import Version
from tensor_models import SIGNATURE, text_inputs, write_tensors

BATCH = "batch"


class Sums(Session):
    """An embedding of the sum of a row's ids, which is its label. `most`: rows that there is memory for. `error`: added to the sums."""

    def __init__(self, most: int = 100, error: int = 0) -> None:
        super().__init__(signature=SIGNATURE, engine="none", precision="f32", threads=1)
        self.most, self.error = most, error
        self.calls: list[int] = []

    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        rows = len(inputs["ids"])
        assert dict(dims)[BATCH] == rows
        self.calls.append(rows)
        if rows > self.most:
            raise MemoryError
        label = inputs["ids"].sum(1) + self.error
        answer = {"embedding": np.repeat(label[:, None], 24, 1).astype(np.float32), "label": label}
        return {name: answer[name] for name in outputs}

    def layers(self) -> list[ExecutedLayer]:
        return []


def group_of(inputs: Named, version: Version | None = None, *outputs: str) -> Group:
    _, dims = check_inputs(inputs, SIGNATURE)
    free = tuple(dim for dim in dims if dim[0] != BATCH)
    return Group(version or Version(name="1", path=Path("1")), free, BATCH, 2 * dict(dims)["tokens"], outputs or ("label", "embedding"))


def serving(shelf: Any, monkeypatch: pytest.MonkeyPatch, session: Session, **rollout: Any) -> Slot:
    slot = Slot("m", shelf, rollout=Rollout(**rollout))
    monkeypatch.setattr(slot.load(Path("1"), "1"), "_session", session)
    return slot


@pytest.mark.parametrize("most", [100, 1])
def test_each_job_gets_its_rows(shelf: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    session = Sums(most)
    slot = serving(shelf, monkeypatch, session)
    requests = [text_inputs(rows, 4, seed=rows) for rows in (1, 3, 2)]
    jobs = []
    for inputs in requests:
        lease = slot.lease()
        jobs.append(Job(group=group_of(inputs, lease.version), rows=len(inputs["ids"]), payload=Work(inputs=inputs, lease=lease)))
    answers = Executor(slot)(Batch(tuple(jobs), jobs[0].group, 6))
    assert session.calls == ([6] if most > 1 else [6, *[1] * 6])
    for inputs, answer, job in zip(requests, answers, jobs, strict=True):
        assert list(answer) == ["label", "embedding"]
        np.testing.assert_array_equal(answer["label"], inputs["ids"].sum(1))
        assert job.payload.recovered == ("" if most > 1 else "one row at a time")


def test_no_memory_for_a_row(clock: Any) -> None:
    inputs = text_inputs(1, 4)
    with pytest.raises(MuntinError, match="no memory for one row of tokens 4: send smaller ones"):
        Recovery(clock).compute(Sums(0), group_of(inputs), inputs)


@pytest.mark.parametrize(("error", "passed"), [(0, True), (1, False)])
def test_candidate_is_compared(shelf: Any, monkeypatch: pytest.MonkeyPatch, error: int, passed: bool) -> None:
    slot = serving(shelf, monkeypatch, Sums(), shadow=1.0)
    current, inputs = slot.current, text_inputs(3, 4)
    assert current is not None
    candidate = Version(name="2", path=Path("2"), state="ready")
    candidate._session = Sums(error=error)
    agreements: list[float] = []
    monkeypatch.setattr(slot, "observe", lambda *_, agreement, **__: agreements.append(agreement))
    group = group_of(inputs, current)
    Executor(slot).shadow(candidate, group, inputs, group.compute(current.session, inputs), beside=current)
    assert (agreements[0] >= slot.rollout.min_agreement) == passed


def test_requests_join_in_batches(socketless: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any, tmp_path: Path) -> None:
    """While the engine computes requests wait, those of one size and the same outputs in one group."""
    begun, go_on, sizes, compute = threading.Event(), threading.Event(), list[set[tuple[int, ...]]](), Executor.__call__

    def held(executor: Executor, batch: Batch) -> Any:
        begun.set()
        assert go_on.wait(60)
        sizes.append({job.payload.inputs["ids"].shape[1:] for job in batch.jobs})
        return compute(executor, batch)

    async def ask(server: Any, requests: list[Named]) -> list[Any]:
        def request(inputs: Named) -> InferRequest:
            kinds = {"ids": "INT64", "mask": "BOOL"}
            given = tuple(InferInput(name=name, datatype=kinds[name], shape=array.shape, data=array) for name, array in inputs.items())
            return InferRequest(id="", inputs=given, outputs=(), parameters={"binary_data_output": True})

        service = server.parts.service
        tasks = [asyncio.create_task(service.infer(request(inputs), model="m", version=None)) for inputs in requests]
        while service.runner.snapshot().admitted < len(requests):
            await asyncio.sleep(0.001)
        go_on.set()
        return await asyncio.gather(*tasks)

    monkeypatch.setattr(Executor, "__call__", held)
    requests = [text_inputs(1 + number % 2, 8 if number % 3 else 6, seed=number) for number in range(16)]
    with socketless(write_tensors(tmp_path / "m").path, max_batch=8) as server:
        answers = server.run(ask(server, requests))
        session = server.slot.current.session
        for inputs, answer in zip(requests, answers, strict=True):
            outputs = {output.name: output.data for output in answer.response.outputs}
            np.testing.assert_allclose(outputs["embedding"], session(inputs)["embedding"], rtol=0.02, atol=0.05)
    assert all(len(shapes) == 1 for shapes in sizes) and max(answer.batch_rows for answer in answers) > 2
