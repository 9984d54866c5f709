"""`seedloom schedule`: the line works as cron runs it, the manifests are what Kubernetes and KubeRay take."""

from __future__ import annotations

import shlex
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from jobs.schedule import kubernetes_name
from tests.local_build import config, run
from tests.small_build import listing, seeds_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")

ROOT = Path(__file__).parents[2]
NIGHTLY = "0 2 * * *"

# --- cron --------------------------------------------------------------------------------------------------


@pytest.fixture
def crontab(tmp_path, monkeypatch):
    """A crontab command that keeps its table in a file, and whose words are those of the real one."""
    table = tmp_path / "table"
    command = tmp_path / "bin" / "crontab"
    command.parent.mkdir()
    command.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -l ]; then [ -f {table} ] && cat {table} && exit 0\n'
        'echo "no crontab for you" >&2; exit 1; fi\n'
        f'[ "$1" = - ] && cat > {table}\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    return table


def test_what_cron_runs_is_the_build(tmp_path, seedloom):
    """The line is given to sh as cron does, in another folder and with next to no environment."""
    path = config(tmp_path, targets=[{"classes": ["circle"], "accepted": 4}])
    line = seedloom("schedule", path, "--cron", NIGHTLY).out.strip()
    assert line.startswith(f"{NIGHTLY} cd {shlex.quote(str(Path.cwd()))} && ")
    command = line.split(maxsplit=5)[5].replace(r"\%", "%")
    done = subprocess.run(
        ["sh", "-c", command], cwd="/", env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}, check=False
    )
    log = path.with_suffix(".log").read_text()
    assert done.returncode == 0, log
    assert "complete" in log


def test_installing_again_replaces_the_line_and_leaves_those_of_others(tmp_path, seedloom, crontab):
    crontab.write_text("MAILTO=me\n5 4 * * * other\n")
    first, second = config(tmp_path / "a % b"), config(tmp_path / "b")
    for path, times in ((first, NIGHTLY), (second, "30 3 * * 1"), (first, "15 1 * * *")):
        assert seedloom("schedule", path, "--cron", times, "--install").code == 0
    lines = crontab.read_text().splitlines()
    assert lines[:2] == ["MAILTO=me", "5 4 * * * other"]
    assert [line[:10] for line in lines[2:]] == ["30 3 * * 1", "15 1 * * *"]
    assert "a \\% b" in lines[3]
    assert "%" not in lines[3].replace(r"\%", "")


def test_a_first_line_is_installed_where_there_was_no_crontab(tmp_path, seedloom, crontab):
    assert seedloom("schedule", config(tmp_path), "--cron", NIGHTLY, "--install").code == 0
    assert len(crontab.read_text().splitlines()) == 1


def test_without_cron_it_says_so(tmp_path, seedloom, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = seedloom("schedule", config(tmp_path), "--cron", NIGHTLY, "--install")
    assert ended.code == 2
    assert "there is no crontab command here" in ended.err


@pytest.mark.parametrize(
    "times", ["", "daily", "* * * *", "0 0 2 * * *", "61 2 * * *", "0 2 31 2 *", "0 2 * * MOO"]
)
def test_what_never_comes_is_refused(tmp_path, seedloom, times):
    ended = seedloom("schedule", config(tmp_path), "--cron", times)
    assert ended.code == 2
    assert f"--cron {times!r}" in ended.err
    assert ended.err.count("\n") == 1


def test_what_cannot_be_built_is_not_scheduled(tmp_path, seedloom, crontab):
    path = config(tmp_path, targets=[{"classes": ["circle"], "accepted": 0}])
    assert seedloom("schedule", path, "--cron", NIGHTLY, "--install").code == 2
    assert not crontab.exists()


def test_a_scheduled_build_makes_what_is_new_and_nothing_else(tmp_path, references):
    """An unchanged input is nothing to do; a new image is inverted alone, and makes its class again."""
    path = config(tmp_path, references, recipes={"mixed": seeds_recipe()}, filter=[],
                  targets=[{"classes": ["circle", "gear"], "accepted": 4}])  # fmt: skip
    output = tmp_path / "out"
    assert run(path).made
    before = listing(output)
    assert not run(path).made
    assert listing(output) == before
    from jobs.tangram.drawings import write_references

    write_references(tmp_path / "more", ["gear"], per_class=1, rng_seed=99)
    (new,) = (tmp_path / "more" / "gear").iterdir()
    new.rename(references / "gear" / "new.png")
    assert run(path).made
    after = listing(output)
    assert {name: after[name] for name in before if name != "latest.json"} == {
        name: facts for name, facts in before.items() if name != "latest.json"
    }
    came = [name for name in after if name not in before]
    assert sum(name.startswith("seeds/") for name in came) == 1
    streams = {name.split("/")[1] for name in came if name.startswith("parts/")}
    assert len(streams) == 1  # of gear; circle's are as they were


# --- Kubernetes --------------------------------------------------------------------------------------------

# Fields that ray.io/v1 of KubeRay 1.6 and batch/v1 know, of those that a file of ours might have.
POD = {
    "containers", "volumes", "restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "tolerations",
    "serviceAccountName", "initContainers", "imagePullSecrets", "affinity",
}  # fmt: skip
CONTAINER = {"name", "image", "command", "args", "env", "envFrom", "resources", "volumeMounts", "lifecycle"}
GROUP = {"rayStartParams", "template"}
WORKERS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "idleTimeoutSeconds",
    "scaleStrategy",
}
CLUSTER = {
    "headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions",
    "gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy", "authOptions",
}  # fmt: skip
JOB = {
    "entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "jobId",
    "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "clusterSelector", "suspend", "metadata",
    "submitterPodTemplate", "submitterConfig", "entrypointNumCpus", "entrypointNumGpus", "rayClusterSpec",
    "entrypointResources", "deletionStrategy", "managedBy",
}  # fmt: skip
AUTOSCALER = {"idleTimeoutSeconds", "upscalingMode", "resources", "image", "env", "envFrom", "version"}
CRON = {
    "schedule", "concurrencyPolicy", "jobTemplate", "startingDeadlineSeconds", "successfulJobsHistoryLimit",
    "failedJobsHistoryLimit", "suspend", "timeZone",
}  # fmt: skip


def demand(found: dict, allowed: set[str], required: set[str] = frozenset()) -> None:
    assert found.keys() <= allowed, found.keys() - allowed
    assert required <= found.keys(), required - found.keys()


def check_pod(template: dict) -> None:
    demand(template, {"spec", "metadata"}, {"spec"})
    spec = template["spec"]
    demand(spec, POD, {"containers"})
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        demand(container, CONTAINER, {"name", "image"})
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
        assert all(isinstance(v, str) for v in container["resources"]["limits"].values())


def check_cluster(spec: dict) -> None:
    demand(spec, CLUSTER, {"headGroupSpec"})
    demand(spec.get("autoscalerOptions", {}), AUTOSCALER)
    demand(spec["headGroupSpec"], GROUP | {"serviceType", "headService", "enableIngress"}, GROUP)
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    check_pod(spec["headGroupSpec"]["template"])
    for group in spec["workerGroupSpecs"]:
        demand(group, GROUP | WORKERS, {"groupName", *GROUP})
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"])


def check_job(spec: dict) -> None:
    demand(spec, JOB, {"entrypoint", "rayClusterSpec"})
    assert spec.get("submissionMode", "K8sJobMode") in (
        "K8sJobMode",
        "HTTPMode",
        "InteractiveMode",
        "SidecarMode",
    )
    assert spec.get("entrypointNumGpus", 0) == 0  # it would take a GPU away from the workers
    assert "ttlSecondsAfterFinished" not in spec or spec["shutdownAfterJobFinishes"]
    check_cluster(spec["rayClusterSpec"])


def check_cronjob(spec: dict) -> None:
    demand(spec, CRON, {"schedule", "jobTemplate"})
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    demand(
        job, {"template", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"}, {"template"}
    )
    assert job["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    check_pod(job["template"])


def check(document: dict) -> str:
    demand(document, {"apiVersion", "kind", "metadata", "spec"}, {"apiVersion", "kind", "metadata", "spec"})
    kind, spec = document["kind"], document["spec"]
    assert document["apiVersion"] == ("batch/v1" if kind == "CronJob" else "ray.io/v1")
    match kind:
        case "RayJob":
            check_job(spec)
        case "RayCluster":
            check_cluster(spec)
        case "CronJob":
            check_cronjob(spec)
        case "RayCronJob":
            demand(spec, {"schedule", "jobTemplate", "suspend", "timeZone"}, {"schedule", "jobTemplate"})
            check_job(spec["jobTemplate"])
    return kind


def test_the_files_have_fields_that_exist():
    found = {
        file.name: file for file in (files("jobs") / "kubernetes").iterdir() if file.name.endswith(".yaml")
    }
    kinds = {name: check(yaml.safe_load(file.read_text())) for name, file in found.items()}
    assert kinds == {
        "job.yaml": "RayJob",
        "cluster.yaml": "RayCluster",
        "cronjob.yaml": "CronJob",
        "raycronjob.yaml": "RayCronJob",
    }


def test_a_field_that_does_not_exist_would_be_found():
    document = yaml.safe_load((files("jobs") / "kubernetes" / "job.yaml").read_text())
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["gpus"] = 1
    with pytest.raises(AssertionError, match="gpus"):
        check(document)


def test_the_manifest_holds_the_config_and_the_times(tmp_path, seedloom):
    path = config(tmp_path, name="Rare Shapes!")
    ended = seedloom("schedule", path, "--cron", " 0  2 * * * ", "--kubernetes", "--image", "me/seedloom:1")
    configmap, job = yaml.safe_load_all(ended.out)
    assert configmap["data"]["dataset.yaml"] == path.read_text()
    assert check(job) == "CronJob"
    assert job["metadata"]["name"] == "seedloom-rare-shapes"
    assert job["spec"]["schedule"] == NIGHTLY
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "me/seedloom:1"
    assert pod["volumes"][0]["configMap"]["name"] == configmap["metadata"]["name"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("x" * 99, "seedloom-" + "x" * 36),
        ("日本", "seedloom"),
        ("a__b", "seedloom-a-b"),
        ("-A-", "seedloom-a"),
    ],
)
def test_a_name_is_one_that_kubernetes_takes(name, label):
    assert kubernetes_name(name) == label


@pytest.mark.parametrize("arguments", [["--kubernetes"], ["--kubernetes", "--install", "--image", "x"]])
def test_what_does_not_go_together_is_one_line(tmp_path, seedloom, crontab, arguments):
    ended = seedloom("schedule", config(tmp_path), "--cron", NIGHTLY, *arguments)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert not crontab.exists()
