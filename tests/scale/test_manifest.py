"""The manifest for KubeRay: the names of its fields are those of the custom resource RayJob, version ray.io/v1."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from selfeval.cli import app

MANIFEST = Path(__file__).resolve().parents[2] / "examples" / "ray" / "rayjob.yaml"

JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus", "entrypointNumGpus",
    "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes",
    "submissionMode", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "headServiceAnnotations",
    "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
HEAD = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKERS = {
    "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
    "scaleStrategy", "suspend", "template",
}  # fmt: skip


def _manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text("utf-8"))
    return found


def test_the_fields_are_those_of_the_custom_resource() -> None:
    job = _manifest()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= JOB
    assert set(cluster) <= CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) <= WORKERS
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(isinstance(v, str) for g in (group, cluster["headGroupSpec"]) for v in g["rayStartParams"].values())


def test_every_pod_mounts_the_volume_of_the_run_folder() -> None:
    job = _manifest()
    words = shlex.split(job["spec"]["entrypoint"])
    output = words[words.index("--output") + 1]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        (mount,) = [m for m in container["volumeMounts"] if output.startswith(m["mountPath"] + "/")]
        assert volumes[mount["name"]] == "selfeval"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_its_command_is_one_that_there_is() -> None:
    job = _manifest()
    _, command, *words = shlex.split(job["spec"]["entrypoint"])
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert [word for word in words if word.startswith("--") and word not in shown] == []
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert words[words.index("--workers") + 1] == str(group["replicas"])
