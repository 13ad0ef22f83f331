"""The files in `deploy/`: their schemas, and that the server's options in them agree with the probes, ports and times around them.

Each container's command line is read by `muntin serve` itself.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from muntin.cli import main
from muntin.serving.config import ServeConfig

DEPLOY = Path(__file__).parents[1] / "deploy"
SCHEMAS = "1.37"
MARGIN_S = 10
"""Seconds that a server needs after its requests are answered or cut off."""


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")))


def pod_of(path: str) -> dict[str, Any]:
    """The pod that a file describes; KServe writes a ServingRuntime's containers and volumes into one."""
    first = documents(path)[0]
    if first["kind"] == "Deployment":
        return dict(first["spec"]["template"]["spec"])
    (service,) = documents("kserve/inference-service.yaml")
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    return {name: first["spec"][name] for name in ("containers", "volumes")} | {"terminationGracePeriodSeconds": grace}


def config_of(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeConfig:
    """The settings that `muntin serve` reads from the arguments of a container."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("muntin.cli.serve._run", lambda artifact, config, json: configs.append(config))
    (tmp_path / "tokens.txt").write_text("secret\n")
    arguments = [argument.replace("/tokens/", f"{tmp_path}/").replace("{{.Name}}", "roofs") for argument in arguments]
    monkeypatch.setattr("sys.argv", ["muntin", "serve", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return configs[0]


@pytest.mark.parametrize("document", documents("kubernetes/muntin.yaml"), ids=lambda document: document["kind"])
def test_schema_of_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, SCHEMAS, strict=True)


def test_schema_of_kserve() -> None:
    """The fields of KServe's own are few; the rest is a pod's."""
    (runtime,), (service,) = documents("kserve/serving-runtime.yaml"), documents("kserve/inference-service.yaml")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": runtime["metadata"], "spec": pod_of("kserve/serving-runtime.yaml")}
    kubernetes_validate.validate(pod, SCHEMAS, strict=True)
    assert runtime["spec"].keys() - pod["spec"].keys() == {"supportedModelFormats", "protocolVersions"}
    model, (container,), (served,) = (
        service["spec"]["predictor"]["model"],
        runtime["spec"]["containers"],
        runtime["spec"]["supportedModelFormats"],
    )
    assert container["name"] == "kserve-container" and container["args"][0] == "/mnt/models"
    assert service["spec"]["predictor"]["automountServiceAccountToken"] is False  # a server needs no rights in the cluster
    assert model["runtime"] == runtime["metadata"]["name"] and model["modelFormat"]["name"] == served["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


@pytest.mark.parametrize("path", ["kubernetes/muntin.yaml", "kserve/serving-runtime.yaml"])
def test_server_in_a_pod(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = pod_of(path)
    (container,) = pod["containers"]
    config = config_of(container["args"], tmp_path, monkeypatch)
    ports = {port.get("name", "http"): port["containerPort"] for port in container["ports"]}
    assert config.host == "0.0.0.0" and ports.get("http") == config.http_port and ports.get("grpc") == config.grpc_port  # noqa: S104
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert ports.get(get["port"], get["port"]) == config.http_port
        assert get["path"] == f"/v2/health/{'live' if probe == 'livenessProbe' else 'ready'}"
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + config.drain_seconds + MARGIN_S
    assert container["resources"]["limits"]["cpu"] == str(config.threads)
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert container["securityContext"]["readOnlyRootFilesystem"] and written == {"/cache", "/tmp"}  # noqa: S108


def test_server_in_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    of = {word: rest for word, _, rest in (line.partition(" ") for line in lines) if word.isupper()}  # the last of each kind
    assert json.loads(of["ENTRYPOINT"]) == ["muntin", "serve"]
    config = config_of(json.loads(of["CMD"]), tmp_path, monkeypatch)
    assert of["EXPOSE"].split() == [str(config.http_port), str(config.grpc_port)]
    assert f"127.0.0.1:{config.http_port}/v2/health/ready" in of["HEALTHCHECK"]
    environment = dict(part.split("=", 1) for part in shlex.split(of["ENV"]))
    assert environment["MUNTIN_CACHE"] == "/cache" and environment["HOME"] == "/tmp"  # noqa: S108
    for path in ("kubernetes/muntin.yaml", "kserve/serving-runtime.yaml"):
        pod = pod_of(path)
        user = pod.get("securityContext", pod["containers"][0]["securityContext"])["runAsUser"]
        assert of["USER"] == str(user)
    packages, own = [line for line in lines if "pip install" in line]
    assert "--require-hashes" in packages and "--no-deps --no-build-isolation" in own


def test_packages_of_the_image() -> None:
    """Everything that the extra `serve` and the build need is in the lock file, in an allowed version and with digests."""
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    needed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["serve"],
    ]
    text = (DEPLOY / "requirements.txt").read_text()
    entries = re.findall(r"^([\w.-]+)==(\S+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}[^\n]*\n)+)", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)) and "://" not in text
    locked = {canonicalize_name(name): version for name, version, _ in entries}
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), f"{requirement}: run `make lock`"
