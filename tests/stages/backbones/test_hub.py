"""Downloads from a hub: once for each node, by name, and one clear line when they fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from schemas.errors import UserError
from stages.backbones import hub

ROOT = Path(__file__).parents[3]


@pytest.fixture
def repository(tmp_path, stub_hub):
    folder = tmp_path / "repository"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "inner" / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "flax_model.msgpack").write_bytes(b"large")
    stub_hub.add("owner/name", folder)
    return folder


def test_only_what_is_named_is_fetched(stub_hub, repository):
    folder = hub.fetch("owner/name", ("config.json",), "x")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    hub.fetch_weights("owner/name", folder, "model.safetensors", "x")
    assert (folder / "model.safetensors").read_bytes() == bytes(1000)
    assert {file for method, file in stub_hub.asked if method == "GET"} == {
        "config.json",
        "model.safetensors",
    }


def test_a_revision_may_be_named(stub_hub, repository):
    commit = stub_hub.commit("owner/name")
    assert hub.fetch(f"owner/name@{commit}", ("config.json",), "x").name == commit
    with pytest.raises(UserError, match=r"clip x cannot be downloaded: owner/name has no revision v9: give"):
        hub.fetch("owner/name@v9", ("config.json",), "clip x")


def test_weights_are_of_the_commit_of_their_config(stub_hub, repository):
    folder = hub.fetch("owner/name", ("config.json",), "x")
    (repository / "model.safetensors").write_bytes(bytes(999))  # the owner uploads another model meanwhile
    with pytest.raises(UserError, match=f"has no revision {folder.name}"):  # this hub forgets old commits
        hub.fetch_weights("owner/name", folder, "model.safetensors", "x")


def test_pickles_are_told_and_not_fetched(stub_hub, repository):
    folder = hub.fetch("owner/name", ("config.json",), "x")
    with pytest.raises(
        UserError, match=r"has no inner/model.safetensors; it has pytorch_model.bin, but pick"
    ):
        hub.fetch_weights("owner/name", folder, "inner/model.safetensors", "x")
    with pytest.raises(UserError, match=r"has no other.safetensors$"):
        hub.fetch_weights("owner/name", folder, "other.safetensors", "x")
    assert not any(file.endswith(".bin") for _, file in stub_hub.asked)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((404, "RepoNotFound"), r"the hub has no owner/name, or it is private: .*HF_TOKEN"),
        ((403, "GatedRepo"), r"the owner of owner/name wants terms accepted: .*HF_TOKEN"),
        ((503, ""), r"the hub cannot be reached, and owner/name is not whole in .*`hf download owner/name`"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(stub_hub, repository, monkeypatch, refusal, said):
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", ())
    stub_hub.refused["owner/name"] = refusal
    with pytest.raises(UserError, match=f"^clip x cannot be downloaded: {said}") as caught:
        hub.fetch("owner/name", ("config.json",), "clip x")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UserError, match="'a b' is no hub id: give owner/name"):
        hub.fetch("a b", ("config.json",), "x")


def test_without_a_network_the_cache_is_enough_if_it_is_whole(stub_hub, repository, monkeypatch):
    folder = hub.fetch("owner/name", ("config.json",), "x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch.cache_clear()
    assert hub.fetch("owner/name", ("config.json",), "x") == folder
    with pytest.raises(UserError, match=r"the hub cannot be reached, and owner/name is not whole in this"):
        hub.fetch_weights("owner/name", folder, "model.safetensors", "x")
    with pytest.raises(UserError, match=r"the hub cannot be reached, and owner/other is not whole in this"):
        hub.fetch("owner/other", ("config.json",), "x")


def test_the_processes_of_a_node_download_a_file_once(stub_hub, repository, tmp_path):
    """The bytes are held back until all three have asked for the file."""
    stub_hub.hold = lambda file: stub_hub.asked["HEAD", "config.json"] < 3
    code = (
        "from stages.backbones import hub\n"
        "print((hub.fetch('owner/name', ('config.json',), 'x') / 'config.json').read_text())"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": stub_hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    workers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [worker.communicate(timeout=120)[0] for worker in workers] == [b"{}\n"] * 3
    assert stub_hub.asked["GET", "config.json"] == 1
