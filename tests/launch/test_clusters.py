"""The cluster-launcher files and the RayJob: what Ray, the clouds and we ask of them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers_launch import LAUNCH, ROOT, read

from raymaml.cluster.runtime import _ENVIRONMENT
from raymaml.training.settings import MALLOC_ENVIRONMENT

CLUSTERS = ["aws.yaml", "gcp.yaml"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_prepares_a_cluster_file_and_finds_it_valid(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))

    config["available_node_type"] = config.pop("available_node_types")
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_closed_and_its_workers_are_spot_machines_with_a_gpu(name: str) -> None:
    config = read(name)
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert 0 < gpu["min_workers"] <= gpu["max_workers"] <= config["max_workers"]
    spot = {"aws.yaml": "MarketType: spot", "gcp.yaml": "provisioningModel: SPOT"}[name]
    assert spot in yaml.dump(gpu)
    assert spot not in yaml.dump(head)

    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in (LAUNCH / name).read_text("utf-8")
    for line in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in line
        assert "--disable-usage-stats" in line
        assert all(f"{key}={value}" in line for key, value in MALLOC_ENVIRONMENT.items())
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", [*CLUSTERS, "Dockerfile"])
def test_the_image_has_the_ray_that_is_installed_here(name: str) -> None:
    import ray

    assert f" rayproject/ray:{ray.__version__}-" in (LAUNCH / name).read_text("utf-8")


@pytest.mark.slow
def test_what_the_image_copies_is_enough_for_pip(tmp_path: Path) -> None:
    lines = (LAUNCH / "Dockerfile").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, target = line.split()[2:]
            place = tmp_path / target.removeprefix("/home/ray/").rstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, place)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    place = tmp_path / "installed"
    subprocess.run([*pip, f"--target={place}", tmp_path / "raymaml"], check=True)
    assert (place / "raymaml/data/bank.py").is_file()
    assert (place / "bin/raymaml").is_file()


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A simulated EC2 with the instance profile that aws.yaml names."""
    monkeypatch.setenv("HOME", str(tmp_path))  # keys are written there
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "none")
    import boto3
    from moto import mock_aws

    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="raymaml")
        yield boto3.client("ec2", region_name="us-west-2")


@pytest.mark.nightly
def test_ray_sets_up_the_network_and_a_spot_worker_of_aws_yaml(amazon: Any) -> None:
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    config = read("aws.yaml")
    image = amazon.describe_images()["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = image

    config = _bootstrap_config(config, no_config_cache=True)

    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert "GPU" not in config["available_node_types"]["head"]["resources"]
    assert open_ports(amazon) == [(22, 22)]  # nothing but ssh from outside

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu"}
    provider.create_node(gpu["node_config"], tags, 1)
    (reservation,) = amazon.describe_instances()["Reservations"]
    (worker,) = reservation["Instances"]
    assert (worker["InstanceType"], worker["InstanceLifecycle"]) == ("g5.xlarge", "spot")


def open_ports(amazon: Any) -> list[tuple[int, int]]:
    """The ports, from and to, that Ray's security group opens to any address."""
    groups = amazon.describe_security_groups()["SecurityGroups"]
    (ours,) = [group for group in groups if group["GroupName"].startswith("ray-autoscaler")]
    return [
        (rule["FromPort"], rule["ToPort"]) for rule in ours["IpPermissions"] if rule["IpRanges"]
    ]


@pytest.mark.nightly
def test_the_machines_of_gcp_yaml_are_what_googles_interface_describes() -> None:
    from googleapiclient.discovery_cache import get_static_doc

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    instance = jsonschema.Draft7Validator(
        {"$ref": "#/schemas/Instance", "schemas": as_json_schema(schemas)}
    )
    kinds = read("gcp.yaml")["available_node_types"]
    for kind in kinds.values():
        instance.validate(kind["node_config"])

    wrong = kinds["gpu"]["node_config"]
    wrong["scheduling"]["provisioningModell"] = "SPOT"
    assert not instance.is_valid(wrong)


def as_json_schema(description: Any) -> Any:
    """Turn Google's description of types into JSON schemas that refuse unknown keys."""
    if isinstance(description, list):
        return [as_json_schema(each) for each in description]
    if not isinstance(description, dict):
        return description
    schema = {key: as_json_schema(value) for key, value in description.items()}
    if isinstance(schema.get("$ref"), str):
        schema["$ref"] = f"#/schemas/{schema['$ref']}"
    if str(schema.get("format")).endswith(("int64", "int32")):
        schema.pop("type", None)  # numbers are strings there, and numbers are taken
    if schema.get("type") == "object" and "properties" in schema:
        schema["additionalProperties"] = False
    for key in ("id", "required"):  # with another meaning there
        if not isinstance(schema.get(key), dict):
            schema.pop(key, None)
    return schema


def test_a_rayjob_is_what_kuberay_asks_for() -> None:
    import ray

    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}
    assert spec["backoffLimit"] > 0
    # A time to live needs the shutdown: KubeRay refuses the one without the other.
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    # KubeRay passes this on through a shell, in double quotes.
    assert "$" not in spec["runtimeEnvYAML"]
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}

    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    command = spec["entrypoint"].split()
    assert f"cluster.num_workers={groups['gpu']['replicas']}" in command


def test_every_pod_of_a_rayjob_has_image_settings_and_equal_requests_and_limits() -> None:
    cluster = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    expected = {"RAY_USAGE_STATS_ENABLED": _ENVIRONMENT["RAY_USAGE_STATS_ENABLED"]}
    for container in containers:
        assert container["image"] == containers[0]["image"]
        given = {each["name"]: each["value"] for each in container["env"]}
        assert given == expected | MALLOC_ENVIRONMENT
        assert container["resources"]["requests"] == container["resources"]["limits"]
    gpus = [each["resources"]["limits"].get("nvidia.com/gpu") for each in containers]
    assert gpus == [None, "1", None]


def test_an_evicted_worker_has_the_time_that_ray_takes_to_drain_its_node() -> None:
    from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

    for group in read("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S > 0
