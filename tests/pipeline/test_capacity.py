"""How many workers a cluster has room for, and what each takes of a node."""

from __future__ import annotations

import pytest

from pipeline.capacity import matching, share_of
from pipeline.config import Run
from schemas.errors import UserError

NODE = {"GPU": 2.0, "CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "run", "expected"),
    [
        # workers, GPUs and CPUs of each; a GPU worker waits for no CPU
        ([NODE, NODE], {}, (4, 1, 0)),
        ([{"CPU": 4.0}, NODE], {}, (2, 1, 0)),  # as beside a head without GPUs
        ([NODE, NODE], {"gpus_per_worker": 0.5}, (8, 0.5, 0)),
        ([NODE, NODE], {"gpus_per_worker": 0.3}, (12, 0.3, 0)),  # no share lies on two GPUs
        ([{"GPU": 3.0}, {"GPU": 3.0}], {"gpus_per_worker": 2}, (2, 2, 0)),  # and no worker on two nodes
        ([NODE, NODE], {"workers": 3}, (3, 1, 0)),
        ([{"CPU": 4.0}] * 2, {"device": "gpu", "workers": 3}, (3, 1, 0)),  # they are to come
        ([{"CPU": 5.0}, {"CPU": 3.0}], {"threads_per_worker": 2}, (3, 0, 2)),
        ([{"CPU": 1.0}], {"threads_per_worker": 2}, (1, 0, 1)),
        ([{"CPU": 2.0}], {"workers": 8}, (8, 0, 0.25)),
        ([{"CPU": 1.0}] * 3, {"workers": 4}, (4, 0, 0.5)),
    ],
)
def test_workers_share_what_the_cluster_has(nodes, run, expected):
    settings = Run.model_validate(run)
    share = share_of(settings, nodes)
    workers = share.places(nodes) if settings.workers == "auto" else settings.workers
    assert (workers, share.gpus, share.cpus) == expected
    if settings.device == "auto":
        assert share.places(nodes) >= workers


@pytest.mark.parametrize("gpus", [1.5, 5])
def test_a_share_of_gpus_that_cannot_be_had_is_refused_in_one_line(gpus):
    with pytest.raises(UserError, match=rf"run.gpus_per_worker: {gpus:g} given; allowed are a share"):
        share_of(Run(gpus_per_worker=gpus), [NODE, NODE])


def test_nodes_are_chosen_by_their_labels():
    def node(labels, alive=True, gpus=1.0):
        return {"Alive": alive, "Resources": {"GPU": gpus}, "Labels": labels}

    nodes = [node({"kind": "a", "zone": "1"}), node({"kind": "b", "zone": "1"}, gpus=2.0), node({})]
    nodes.append(node({"kind": "a"}, alive=False))

    def gpus(**labels):
        return [n["GPU"] for n in matching(nodes, labels)]

    assert gpus() == [1.0, 2.0, 1.0]
    assert gpus(kind="b") == [2.0]
    assert gpus(kind=("a", "b"), zone="1") == [1.0, 2.0]
    assert gpus(kind="c") == []
