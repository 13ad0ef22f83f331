"""What the server says of itself and its model, in the keys that the protocol's clients read."""

from __future__ import annotations

from muntin.serving.protocol.metadata import (
    EXTENSIONS,
    BatchStatistics,
    Duration,
    ModelDescription,
    Statistics,
    TensorSpec,
    configuration_document,
    server_document,
    statistics_document,
)


def model(max_batch: int = 8) -> ModelDescription:
    return ModelDescription(
        name="m",
        versions=("1", "2"),
        inputs=(TensorSpec(name="images", datatype="UINT8", shape=(-1, -1, -1, 3)),),
        outputs=(TensorSpec(name="scores", datatype="FP32", shape=(-1, 10)), TensorSpec(name="names", datatype="BYTES", shape=(-1, 1))),
        max_batch=max_batch,
    )


def test_server_metadata() -> None:
    assert server_document("muntin", "1.2") == {"name": "muntin", "version": "1.2", "extensions": list(EXTENSIONS)}
    assert {"binary_tensor_data", "classification", "statistics", "model_configuration", "schedule_policy"} <= set(EXTENSIONS)


def test_configuration_for_perf_analyzer() -> None:
    document = configuration_document(model())
    assert "dynamic_batching" in document
    assert document["model_transaction_policy"]["decoupled"] is False
    assert all(item["is_shape_tensor"] is False for item in document["input"] + document["output"])
    assert not {"sequence_batching", "ensemble_scheduling"} & set(document)


def test_configuration_without_a_batch() -> None:
    document = configuration_document(model(0))
    assert document["input"][0]["dims"] == [-1, -1, -1, 3]
    assert "dynamic_batching" not in document


def test_statistics() -> None:
    took = Duration(count=3, ns=900)
    batch = BatchStatistics(batch_size=2, compute_input=took, compute_infer=took, compute_output=took)
    value = Statistics(name="m", version="1", inference_count=6, execution_count=3, success=took, batches=(batch,))
    (item,) = statistics_document([value])["model_stats"]
    assert (item["name"], item["version"], item["inference_count"], item["execution_count"], item["last_inference"]) == ("m", "1", 6, 3, 0)
    durations = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"}
    assert set(item["inference_stats"]) == durations
    assert item["inference_stats"]["success"] == {"count": 3, "ns": 900}
    assert item["inference_stats"]["cache_hit"] == {"count": 0, "ns": 0}
    spent = {"count": 3, "ns": 900}
    assert item["batch_stats"] == [{"batch_size": 2, "compute_input": spent, "compute_infer": spent, "compute_output": spent}]
