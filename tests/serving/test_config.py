"""What a server may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from muntin.serving.config import Bounds, ServeConfig


def test_default_host() -> None:
    assert ServeConfig().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective_ms": 0}, "objective_ms"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 8, "queue_rows": 7}, "7 rows may wait.*--queue"),
        ({"name": "../etc"}, "name"),
        ({"name": ""}, "name"),
        ({"http_port": 70000}, "http_port"),
        ({"tls_key": Path("key.pem")}, "certificate and its key"),
        ({"tokens": ("two words",)}, "without spaces"),
        ({"tokens": ("",)}, "not empty"),
        ({"bounds": {"body_bytes": 5}}, "body_bytes"),
        ({"port": 5}, "port"),
    ],
)
def test_invalid_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServeConfig.model_validate(options)


def test_bounds_are_in_their_own_units() -> None:
    assert Bounds(body_bytes=2048).body_bytes == 2048
