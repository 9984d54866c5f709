"""A worker: the models, once, and how each kind of task is carried out and committed.

One worker serves one device. Several threads may run tasks at once: one of them computes while the others
encode and commit.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline import batches, pack
from pipeline.config import method_of
from pipeline.dag import Candidate, Dag, Materials, in_batches, out_of_memory, score
from pipeline.device import Device
from pipeline.parts import (
    account,
    contents,
    described,
    environment,
    part_name,
    read_table,
    scores_name,
    to_parquet,
)
from pipeline.plan import FilterPlan, Plan, StreamPlan
from pipeline.references import fetch
from pipeline.seeds import Seeds, assess, load_seeds, no_seed, seed_name
from pipeline.store import Store
from pipeline.tasks import (
    AssessTask,
    BatchTask,
    Done,
    InvertTask,
    PackTask,
    PrepareTask,
    ProbeTask,
    Receipt,
    Suspects,
    Task,
    UnitReceipt,
    UnitTask,
)
from pipeline.tensors import artifact_name, read_tensors, to_safetensors
from schemas import tables
from schemas.errors import UserError
from schemas.ids import sha256
from schemas.records import Reference
from stages import images
from stages.backbones.device import default_device
from stages.backbones.diffusion.load import load_backbone
from stages.backbones.models import LoadedModels
from stages.contract import Pairwise
from stages.invert.gate import invert_typical

# Of a GPU's memory, what a batch that is chosen may take: a build finds less of it free than a trial does.
MEMORY_SHARE = 0.85

# Images that a filter looks at together, of those that candidates are compared with.
COMPARED_AT_ONCE = 16

# So many candidates of a unit, all of them failed, say that the method is at fault and not they.
TELLING = 4


class Worker:
    """Runs tasks of one plan against one store."""

    def __init__(self, plan: Plan, uri: str):
        self.plan, self.store = plan, Store(uri)
        self.device = Device(default_device(), plan.config.run.threads_per_worker)
        with self.device.computing("load"):
            self.backbone = load_backbone(plan.config.backbone, self.device.torch)
            self.models = LoadedModels(self.device.torch, self.backbone)
            self._compare_models()
        self.dags = {
            name: Dag(plan.config, recipe, self.backbone, self.models)
            for name, recipe in plan.config.recipes.items()
        }
        self._seeds = lru_cache(maxsize=64)(self._load_seeds)
        self.materials = lru_cache(maxsize=64)(self._load_materials)
        self._compared = lru_cache(maxsize=64)(self._load_compared)

    def run(self, task: Task) -> Receipt:
        """Carry out a task. Raises `UserError` for what a person must mend; others may be tried again."""
        self.device.reset()
        try:
            return self._carry_out(task)
        except Exception as error:
            stream = None if isinstance(task, PackTask) else self.plan.by_id[task.stream]
            if stream and (told := out_of_memory(stream, error)):
                raise told from error
            raise

    def _carry_out(self, task: Task) -> Receipt:
        match task:
            case BatchTask():
                return self._choose_batch(self.plan.by_id[task.stream])
            case InvertTask():
                return self._invert(self.plan.by_id[task.stream], task.references, task.killer)
            case AssessTask():
                stream = self.plan.by_id[task.stream]
                return assess(stream, self.plan.config.recipes[stream.recipe], self._seeds(stream.id))
            case PrepareTask():
                return self._prepare(self.plan.by_id[task.stream], task.kind)
            case UnitTask():
                return self._unit(self.plan.by_id[task.stream], task)
            case ProbeTask():
                stream = self.plan.by_id[task.stream]
                self._candidates(stream, [task.index])
                return Done(1)
            case PackTask():
                return pack.write_shards(self.store, self.plan, task)

    def remake(self, stream_id: str, index: int) -> bytes:
        """Make one candidate again, by running its device batch. Raises what the candidate raises."""
        stream = self.plan.by_id[stream_id]
        first = index - index % stream.batch
        made = self._candidates(stream, list(range(first, first + stream.batch)))[index]
        if isinstance(made, Exception):
            raise made
        return made.image

    def environment(self) -> dict[str, str]:
        return environment(self.device.torch.type, str(self.backbone.dtype).removeprefix("torch."))

    def _compare_models(self) -> None:
        """Another node may have other files under the same name. Raises `UserError`."""
        for name, planned in self.plan.models.items():
            kind: Any
            kind, _, model = name.partition(" ")
            here = self.backbone.fingerprint
            if kind != "backbone":
                here = self.models.fingerprint(kind, model)
            if here != planned:
                raise UserError(
                    f"{name}: the worker on {platform.node()} has other model files ({here}) than the plan"
                    f" ({planned}); give all nodes the same, or run again if they just changed"
                )

    # --- batch, invert and prepare -----------------------------------------------------------------------

    def _choose_batch(self, stream: StreamPlan) -> Receipt:
        for kind, artifact in stream.artifacts.items():
            # what the methods learned of the class does not depend on the batch, so it is kept
            if kind != "combine" and not self.store.exists(artifact_name(artifact)):
                self._prepare(stream, kind)
        lacking: list[Exception] = []

        def runs(size: int) -> bool:
            tried = replace(stream, batch=size)
            try:
                self._try(tried)
            except Exception as error:
                if out_of_memory(tried, error) is None:
                    raise
                lacking.append(error.with_traceback(None))  # its frames hold what filled the memory
            else:
                return True
            self.device.release()
            return False

        with self.device.trying(MEMORY_SHARE * min(1.0, self.plan.config.run.gpus_per_worker)):
            batch = batches.largest(batches.sizes(stream.unit, self.device.torch.type), runs)
        if batch is None:
            raise lacking[-1]
        batches.keep_batch(self.store, self.plan, stream, batch, self.environment())
        return Done(1)

    def _try(self, stream: StreamPlan) -> None:
        """Invert, combine, refine and generate one device batch, of noise in place of the class's seeds."""
        dag, seeds, combining = self.dags[stream.recipe], None, dict[str, Tensor]()
        if stream.seeds:
            shape = (len(stream.references), *self.backbone.latent_shape)
            noise_KCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            seeds = Seeds(stream.references, noise_KCHW, ())
            with self.device.computing("invert"):
                dag.inverter(stream)(self._images(stream.references[:1]))
                if "combine" in stream.artifacts:
                    combining = dag.prepare(stream, "combine", self._images, seeds)
        artifacts = {kind: self._artifact(stream, kind) for kind in stream.artifacts if kind != "combine"}
        materials = Materials(seeds, {**artifacts, "combine": combining}, self._images)
        dag.run(stream, materials, range(stream.batch), self.device.computing)

    def _images(self, references: Sequence[Reference]) -> Tensor:
        pixels = [
            images.to_tensor(images.decode(fetch(self.store, r.sha256)), self.backbone.image_size)
            for r in references
        ]
        return torch.stack(pixels)

    def _invert(self, stream: StreamPlan, references: tuple[Reference, ...], killer: str) -> Receipt:
        assert stream.seeds is not None
        if killer:
            (reference,) = references
            self.store.put_new(seed_name(stream.seeds, reference), no_seed(killer))
            return Done(1)
        recipe = self.plan.config.recipes[stream.recipe]
        image_N3hw = self._images(references)
        padding = torch.zeros(stream.batch - len(references), *image_N3hw.shape[1:])
        assert recipe.invert is not None
        with self.device.computing("invert"):
            inverted, refused = invert_typical(
                method_of("invert", recipe.invert),
                self.backbone,
                torch.cat([image_N3hw, padding]).to(self.device.torch),
                stream.prompt,
            )
        z_BCHW = inverted.z_BCHW.float().cpu()
        for row, reference in enumerate(references):
            if torch.isfinite(z_BCHW[row]).all():
                measures = {**inverted.measures[row], "refused": refused[row]}
                data = to_safetensors({"z_CHW": z_BCHW[row]}, measures)
            else:
                data = no_seed("its inversion is not finite")
            self.store.put_new(seed_name(stream.seeds, reference), data)
        return Done(len(references))

    def _prepare(self, stream: StreamPlan, kind: str) -> Receipt:
        if kind.startswith("filter "):
            return self._prepare_filter(next(f for f in stream.filters if f"filter {f.method.name}" == kind))
        dag = self.dags[stream.recipe]
        with self.device.computing("prepare"):
            made = dag.prepare(
                stream, kind, self._images, self._seeds(stream.id) if kind == "combine" else None
            )
        self.store.put_new(artifact_name(stream.artifacts[kind]), to_safetensors(made))
        return Done(1)

    def _prepare_filter(self, chosen: FilterPlan) -> Receipt:
        assert chosen.artifact is not None
        batches = (self._images(some) for some in in_batches(chosen.compared, COMPARED_AT_ONCE))
        with self.device.computing("prepare"):
            made = chosen.method.prepare(self.models, batches)
        self.store.put_new(artifact_name(chosen.artifact), to_safetensors(made))
        return Done(1)

    # --- generate and score ------------------------------------------------------------------------------

    def _unit(self, stream: StreamPlan, task: UnitTask) -> Receipt:
        written = 0
        name = part_name(stream, task.unit)
        if not self.store.exists(name):
            indices = range(task.unit * stream.unit, (task.unit + 1) * stream.unit)
            made: dict[int, Candidate | Exception] = {}
            for batch in in_batches(indices, stream.batch):
                alive = [i for i in batch if i not in task.killers]
                made |= self._candidates(stream, alive, list(batch))
            raised = {i: describe(m) for i, m in made.items() if isinstance(m, Exception)}
            if any(task.suspects.get(i) != text for i, text in raised.items()):
                return Suspects(raised)
            if len(raised) == stream.unit >= TELLING:
                first = next(m for m in made.values() if isinstance(m, Exception))
                raise RuntimeError(f"every candidate of {stream.name} failed: {describe(first)}") from first
            data = self._part(stream, indices, made, {**raised, **task.killers})
            if self.store.put_new(name, data):
                written = len(data)
        for f in stream.filters:
            self._score(stream, task.unit, f)
        committed = account(self.store, stream, task.unit)
        assert committed is not None  # written above, by this call or by another
        seconds = sum(self.device.seconds().values())
        return UnitReceipt(
            committed.outcomes, committed.environment, written > 0, seconds, written, committed.signatures
        )

    def _candidates(
        self, stream: StreamPlan, alive: list[int], batch: list[int] | None = None
    ) -> dict[int, Candidate | Exception]:
        """Make candidates of one device batch; when it raises, each alone, to learn whose fault it is."""
        batch = batch or alive
        dag, materials = self.dags[stream.recipe], self.materials(stream.id)

        def run(wanted: set[int]) -> dict[int, Candidate | Exception]:
            # a candidate keeps the slot that it has in the whole unit
            slots: list[int | None] = [None] * stream.batch
            for i in batch:
                slots[i % stream.batch] = i if i in wanted else None
            return dict(dag.run(stream, materials, slots, self.device.computing))

        try:
            return run(set(alive)) if alive else {}
        except Exception as error:
            if isinstance(error, UserError) or out_of_memory(stream, error):
                raise
        made: dict[int, Candidate | Exception] = {}
        for i in alive:
            try:
                made |= run({i})
            except Exception as error:
                made[i] = error
        return made

    def _part(
        self,
        stream: StreamPlan,
        indices: range,
        made: Mapping[int, Candidate | Exception],
        failed: Mapping[int, str],
    ) -> bytes:
        dag, materials = self.dags[stream.recipe], self.materials(stream.id)
        rows = []
        for index in indices:
            candidate = made.get(index)
            row: dict[str, Any] = dict.fromkeys(tables.PART.names)
            row |= {"index": index, "key": stream.key(index), "prompt": stream.prompt}
            row["artifacts"] = sorted(stream.artifacts.values())
            if isinstance(candidate, Candidate):
                chosen, losses, source = candidate.combination, list(candidate.losses), candidate.source
                row |= {
                    "status": "ok",
                    "prompt": candidate.prompt,
                    "noise_ratio": candidate.noise_ratio,
                    "combined_norm": candidate.combined_norm,
                    "parents_cosine": candidate.parents_cosine,
                    "seed_sha256": candidate.seed_sha256,
                    "seed_norm": candidate.seed_norm,
                    "image_sha256": sha256(candidate.image),
                    "width": candidate.width,
                    "height": candidate.height,
                    "image": candidate.image,
                }
            else:
                chosen, losses, source = None, [], dag.source(stream, index)
                with contextlib.suppress(Exception):  # what failed may be the drawing itself
                    chosen = dag.combination(stream, materials, index)
                row |= {"status": "failed", "error": failed[index]}
            row["refine_losses"] = losses
            row["generate_trace"] = list(candidate.trace) if isinstance(candidate, Candidate) else []
            row |= {"source": source.sha256, "source_class": source.label} if source else {}
            seeds = materials.seeds
            row["parents"] = [seeds.references[p].sha256 for p in chosen.parents] if chosen and seeds else []
            row["weights"] = list(chosen.weights) if chosen else []
            rows.append(row)
        return to_parquet(rows, tables.PART, {**described(stream), "environment": self.environment()})

    def _score(self, stream: StreamPlan, unit: int, chosen: FilterPlan) -> None:
        name = scores_name(stream, chosen, unit)
        if self.store.exists(name):
            return
        part = read_table(self.store, part_name(stream, unit), ["index", "image"])
        encoded = contents(part)
        artifact = self._compared(chosen.artifact) if chosen.artifact else None
        columns = score(stream, self.models, encoded, chosen.method, self.device.computing, artifact)
        rows = [
            {"index": index, **{name: column[place] for name, column in columns.items()}}
            for place, index in enumerate(part.column("index").to_pylist())
        ]
        schema = tables.scores(chosen.method.columns(), isinstance(chosen.method, Pairwise))
        metadata = {"version": tables.VERSION, "filter": chosen.method.name}
        self.store.put_new(name, to_parquet(rows, schema, metadata))

    def _load_seeds(self, stream_id: str) -> Seeds:
        return load_seeds(self.store, self.plan.by_id[stream_id])

    def _load_materials(self, stream_id: str) -> Materials:
        stream = self.plan.by_id[stream_id]
        artifacts = {kind: self._artifact(stream, kind) for kind in stream.artifacts}
        return Materials(self._seeds(stream_id) if stream.seeds else None, artifacts, self._images)

    def _load_compared(self, artifact: str) -> dict[str, Tensor]:
        made = read_tensors(self.store, artifact_name(artifact))
        return {name: tensor.to(self.device.torch) for name, tensor in made.items()}

    def _artifact(self, stream: StreamPlan, kind: str) -> dict[str, Tensor]:
        made = read_tensors(self.store, artifact_name(stream.artifacts[kind]))
        # seeds are combined on the CPU
        return {n: made[n] if kind == "combine" else made[n].to(self.device.torch) for n in made}


def describe(error: Exception) -> str:
    """An exception as it is committed with a failed candidate: its type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
