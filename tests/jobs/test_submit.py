"""Jobs on a cluster: what travels, and an exit code that tells the truth."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from jobs.submit import LOCK, ROOT, complete, demand_shared, pack_folder, requirements, verdict
from pipeline.config import load
from pipeline.ledger import named
from pipeline.store import Store
from schemas.errors import UserError
from tests.ray_build import await_that, ray_cluster, run_build, small_config
from tests.small_build import make_config, noise_recipe

pytestmark = pytest.mark.timeout(900)


def packed(folder: Path, package: Path, with_house: bool = False) -> set[str]:
    pack_folder(folder, package, with_house)
    return set(zipfile.ZipFile(package).namelist())


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "project"
    for name in (
        "dataset.yaml", "my_methods.py", "data/names.csv", "notes/deep/a.txt", "run.sh",
        ".git/config", ".venv/lib/x.py", "env/lib/x.py", "env/pyvenv.cfg", "__pycache__/a.pyc",
        "weights/unet.safetensors", "old.ckpt", "shards/000000.tar", "rows.parquet", "references/ring/1.png",
        "out/builds/1/manifest.json", "private/key.txt", "notes/large.txt", "notes/deep/kept/large.txt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "run.sh").chmod(0o755)
    (folder / ".gitignore").write_text("/out/\n")
    (folder / ".rayignore").write_text("private/\n")
    (folder / "notes" / ".gitignore").write_text("large.txt\n!deep/kept/large.txt\n")
    (folder / "loop").symlink_to(folder)
    return folder


def test_code_and_configs_travel_and_nothing_else(project, tmp_path):
    assert packed(project, tmp_path / "a.zip") == {
        "dataset.yaml", "my_methods.py", "data/names.csv", "notes/deep/a.txt", "notes/deep/kept/large.txt",
        "run.sh", ".gitignore", ".rayignore", "notes/.gitignore",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("notes/deep/a.txt") == b"notes/deep/a.txt"
        modes = {name: archive.getinfo(name).external_attr >> 16 for name in ("run.sh", "dataset.yaml")}
    assert modes == {"run.sh": 0o755, "dataset.yaml": 0o644}


def test_the_same_files_are_the_same_package(project, tmp_path):
    packed(project, tmp_path / "a.zip")
    os.utime(project / "dataset.yaml", (1, 1))
    packed(project, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_travels_is_enough_to_plan(tmp_path):
    """Seedloom comes along, the embedded model with it, and is not the one that is installed here."""
    folder = tmp_path / "project"
    make_config(folder, recipes={"plain": noise_recipe()}, filter=["clip"], output="/nowhere/out")
    names = packed(folder, tmp_path / "a.zip", with_house=True)
    assert LOCK in names
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path / "node")
    code = "import jobs.cli, stages; print(stages.__file__); jobs.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "dataset.yaml"], cwd=tmp_path / "node",
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "node")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "node" / "stages"))
    assert "circle" in done.stdout


def test_what_is_too_large_is_refused_before_it_is_sent(project, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.submit.LIMIT", 2**20)
    (project / "noise.dat").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(UserError, match=r"more than the 1 MiB .* noise\.dat \(3 MiB\).*\.rayignore"):
        packed(project, tmp_path / "a.zip")


def test_nodes_install_the_lock_that_travels(tmp_path):
    here, other = requirements(ROOT / LOCK), tmp_path / LOCK
    assert here["packages"][0] == "-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"
    other.write_text((ROOT / LOCK).read_text() + "\n")
    assert requirements(other) != here  # or Ray would take the environment of the older one
    with pytest.raises(UserError, match="--no-install"):
        requirements(tmp_path / "none.lock")


def test_paths_of_this_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    def check(**content):
        demand_shared(load(make_config(tmp_path, **content)))

    check(output="s3://bucket/out", references={"uri": "/shared/images"})
    check(output="/shared/out")
    with pytest.raises(UserError, match=r"output: './out' is a path of this machine"):
        check(output="./out")
    with pytest.raises(UserError, match=r"references\.uri: 'images' is a path of this machine"):
        check(output="/shared/out", references={"uri": "images"})


# --- the exit code -----------------------------------------------------------------------------------------


def details(status: str, code: int | None = None) -> JobDetails:
    kind = JobType.SUBMISSION
    return JobDetails(
        type=kind, entrypoint="", status=JobStatus(status), driver_exit_code=code, message="why\nmore"
    )


def test_the_exit_code_needs_job_and_manifest(tmp_path):
    path = make_config(tmp_path, targets=[{"classes": ["circle"], "accepted": 6, "attempts": 8}])
    config = load(path)
    assert complete(config) == f"{config.output} is not on this machine"
    run_build(path)
    whole = complete(config)
    short = whole.model_copy(deep=True)
    (account,) = short.targets["circle"].recipes.values()
    account.__dict__["missing"] = 2
    table = [
        (details("SUCCEEDED", 0), whole, 0),
        (details("SUCCEEDED", 0), "", 1),  # whatever the cluster says
        (details("SUCCEEDED", 0), "no credentials here", 0),
        (details("FAILED", 3), short, 3),
        (details("FAILED", 3), "", 1),
        (details("FAILED", 2), whole, 2),  # of an earlier job
        (details("FAILED", 5), "", 5),
        (details("FAILED", 1), whole, 1),
        (details("FAILED", -9), "", 1),
        (details("FAILED"), whole, 1),  # as when its node is lost
        (details("STOPPED"), whole, 130),
    ]
    assert [verdict(job, found)[0] for job, found, _ in table] == [code for *_, code in table]
    assert "cannot be seen from here: no credentials here" in verdict(*table[2][:2])[1]
    assert "why" in verdict(*table[9][:2])[1]


def test_only_a_build_of_this_config_counts(tmp_path):
    first = make_config(tmp_path, recipes={"plain": noise_recipe(batch="auto")})
    config, hasty, other = load(first), load(first, ["run.retries=9"]), load(first, ["rng_seed=5"])
    run_build(first)
    manifest = named(Store(config.output))
    assert complete(config) == manifest
    assert complete(other) == ""
    run_build(make_config(tmp_path, rng_seed=5))  # a newer one of another config
    assert complete(config) == manifest
    assert complete(hasty) == manifest  # how it is run is all the same
    path = tmp_path / "out" / "builds" / manifest.build_id / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"circle", b"square"))
    assert "damaged" in complete(config)


# --- on a cluster ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard():
    """A Ray cluster that takes jobs; its nodes have this checkout on their path, as an image would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        patch.setenv("PYTHONPATH", str(ROOT))
        with ray_cluster() as (cluster, _):
            ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
            cluster.add_node(num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", **ports)
            yield f"http://127.0.0.1:{ports['dashboard_port']}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_jobs_end_as_their_builds_do(dashboard, seedloom, tmp_path):
    """Complete, complete but short, and a mistake: the logs are followed, the code is that of the build."""

    def submit(path: Path, *more: object):
        given = ("--address", dashboard, "--working-dir", tmp_path, "--no-install", "--wait")
        return seedloom("submit", path, *given, *more)

    path = small_config(tmp_path, tmp_path / "log", run={"runner": "ray", "workers": 1})
    ended = submit(path)
    assert ended.code == 0, ended.out + ended.err
    manifest = named(Store(str(tmp_path / "out")))
    assert f"build {manifest.build_id}: starting workers" in ended.out
    assert re.search(rf"job seedloom-\w+: build {manifest.build_id} is complete with 12 samples", ended.out)
    assert ended.out.count("generate: 3 to do") == 1

    ended = submit(path, "--set", "run.runner=local", "--set", "targets.0.attempts=1", "--set", "rng_seed=2",
        "--set", "filter=[{method: tests.small_build:HashFilter, least: 0.9}]", "--json")  # fmt: skip
    assert ended.code == 3, ended.out + ended.err
    assert "attempts used up" in ended.out.splitlines()[-1]
    assert any(json.loads(line)["event"] == "complete" for line in ended.out.splitlines() if line[0] == "{")

    ended = submit(path, "--set", "references={uri: /no/such/folder}", "--set", "recipes.noise.combine=cog")
    assert ended.code == 2, ended.out + ended.err
    assert "failed, exit code 2" in ended.err
    assert "/no/such/folder" in ended.out


def test_who_stops_waiting_leaves_the_job_at_work(dashboard, tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    generate = {"method": "tests.ray_build:Placed", "steps": 1, "guidance": 1, "log": str(log), "traps": {}}
    recipes = {"noise": {"generate": generate, "unit": 4, "batch": 2}}
    path = small_config(tmp_path, log, recipes=recipes, run={"runner": "local"})
    waiting = subprocess.Popen(
        [sys.executable, "-m", "jobs.submit", path, "--address", dashboard, "--no-install", "--wait",
         "--working-dir", tmp_path], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    await_that(
        lambda: list((log / "places").glob("*")) or waiting.poll() is not None, "the first images of the job"
    )
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    job = re.search(r"job (seedloom-\w+): submitted", out)[1]
    assert waiting.returncode == 130
    assert f"the job goes on; ray job logs --follow {job} --address {dashboard}" in err.splitlines()[-1]
    client = JobSubmissionClient(dashboard)
    assert client.get_job_status(job) == JobStatus.RUNNING
    (log / "go").touch()
    await_that(lambda: client.get_job_status(job).is_terminal(), "the end of the job", pause=0.5)
    assert verdict(client.get_job_info(job), complete(load(path)))[0] == 0


def test_a_wrong_address_is_one_line(seedloom, tmp_path):
    path = small_config(tmp_path, tmp_path / "log")
    ended = seedloom("submit", path, "--address", "http://127.0.0.1:9", "--working-dir", tmp_path)
    assert ended.code == 2
    assert ended.err.startswith("seedloom: --address http://127.0.0.1:9: no Ray dashboard answers there")
