"""Predicted latencies: parts of networks, their kernels, and the fit to whole networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from muntin.models import HybridNet, ModelConfig
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import Kernel
from muntin.searching import latency_table
from muntin.searching.latency_table import ArchitectureLatency, PredictionError, attributed, drawn, measured
from muntin.searching.parts import PartProbe, parts_of
from muntin.searching.space import Architecture, Space
from small_space import base_of


def kernel(label: str, ms: float) -> Kernel:
    rest = {"kind": "", "implementation": "", "precision": "i8", "compute": True, "layer": None, "macs": 0, "group": ""}
    return Kernel(name=label, ms=ms, inputs=(), outputs=(), **rest)  # type: ignore[arg-type]


def test_parts_hold_all_parameters(space: Space, base: ModelConfig) -> None:
    for one in drawn(space, base, 10, 0):
        modules = [(times, key, probe, probe.build()) for key, times, probe in parts_of(one, 64)]
        total = 0
        for times, key, probe, module in modules:
            parameters = dict(module.named_parameters())
            own = {name for name in parameters if ("blocks" in name) == (key == probe.keys[-1])} if len(probe.keys) > 1 else set(parameters)
            total += times * sum(parameters[name].numel() for name in own)
        network = HybridNet(one.config.model_copy(update={"gate": False}))
        assert total == sum(parameter.numel() for parameter in network.parameters())


def test_keys_depend_on_what_a_part_has(base: ModelConfig) -> None:
    def keys(**changes: object) -> set[str]:
        config = ModelConfig.model_validate({**base.model_dump(), **changes})
        return {key for key, *_ in parts_of(Architecture(config=config), 64)}

    assert keys(gate=False) == keys()
    assert len(keys(decoder=8) - keys()) == 5  # four levels and the last layer
    assert len(keys(depths=(2, 1)) - keys()) == 0
    assert len(keys(latents=2) - keys()) == 2 and len(keys(attention="local") - keys(attention="local", latents=2)) == 0
    half = parts_of(Architecture(config=base_of("classify"), resolution=0.5, rank_share=0.7), 64)
    assert "32x32, rank share 0.7" in half[0][0] and not any("decoder" in key for key, *_ in half)


def test_kernels_without_a_name_count_for_the_part_before(base: ModelConfig) -> None:
    probes = [probe for key, _, probe in parts_of(Architecture(config=base), 64) if "block" in key or "stem" in key][:2]
    stem, stage = probes
    kernels = [
        kernel("branches.0.part.1.conv", 1), kernel("quantize", 2), kernel("branches.0.after", 4), kernel("reorder", 8),
        kernel("branches.1.before.0", 16), kernel("branches.1.part.reduce.conv", 32), kernel("transpose", 64),
        kernel("branches.1.part.blocks.0.mlp.expand", 128), kernel("softmax", 256), kernel("branches.1.after", 512),
    ]  # fmt: skip
    times = attributed(probes, kernels)
    assert times == {stem.keys[0]: 3, stage.keys[0]: 96, stage.keys[1]: 384}


def test_beginning_in_two_branches(base: ModelConfig) -> None:
    """Stages that differ in their block alone begin alike."""
    others = (base, base.model_copy(update={"mlp_ratio": 4.0}))
    probes = [next(probe for key, _, probe in parts_of(Architecture(config=one), 64) if "block" in key) for one in others]
    assert probes[0].keys[0] == probes[1].keys[0] and probes[0].keys[1] != probes[1].keys[1]
    kernels = [kernel("branches.0.part.reduce.conv", 2), kernel("branches.1.part.reduce.conv", 4)]
    assert attributed(probes, kernels)[probes[0].keys[0]] == 3


def test_prediction_error() -> None:
    error = PredictionError(rows=((1.0, 1.0), (1.05, 1.0), (1.5, 1.0), (0.9, 1.0)))
    assert error.within_tenth == pytest.approx(0.75) and error.row()["largest"] == pytest.approx(0.5)


def test_parts_in_the_cache(base: ModelConfig, space: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A measurement that fails leaves the times of the graphs before it."""
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    graphs = []

    def half(probes: list[PartProbe], options: SessionOptions) -> dict[str, float]:
        if len(graphs) == 2:
            raise KeyboardInterrupt
        graphs.append(probes)
        return {key: 0.5 for probe in probes for key in probe.keys}

    monkeypatch.setattr(latency_table, "measured", half)
    one, model = Architecture(config=base), ArchitectureLatency(64, threads=1)
    count, missing = model.missing([one])
    assert count == missing == len({key for key, *_ in parts_of(one, 64)})
    with pytest.raises(KeyboardInterrupt):
        model.predict(one)
    again = ArchitectureLatency(64, threads=1)
    kept = sum(len(probe.keys) for graph in graphs for probe in graph)
    assert 0 < kept < count and again.missing([one]) == (count, count - kept)
    graphs.clear()
    times = {key: times for key, times, _ in parts_of(one, 64)}
    with pytest.raises(KeyboardInterrupt):
        again.predict(one)
    for key in times:
        again.cache.add(key, {"int8": 0.5})
    assert again.predict(one) == pytest.approx(0.5 * sum(times for _, times, _ in parts_of(one, 64)))


@pytest.mark.slow
def test_measured_parts(base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    one = Architecture(config=base)
    probes = [probe for key, _, probe in parts_of(one, 64) if key.startswith("beginning")][:1]
    times = measured(probes, SessionOptions(threads=1, cache=False), rounds=3)
    assert {key for probe in probes for key in probe.keys} == times.keys() and all(ms > 0 for ms in times.values())
    model = ArchitectureLatency(64, threads=1)
    for part in parts_of(one, 64):
        model.cache.add(part[0], {"int8": times.get(part[0], 0.5)})
    total = model.predict(one)
    assert total == pytest.approx(sum(count * times.get(key, 0.5) for key, count, _ in parts_of(one, 64)))
