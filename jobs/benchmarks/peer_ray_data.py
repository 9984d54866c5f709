"""What a user would write from Ray's documentation: prompts → diffusers in an actor pool → WebDataset.

The other side of `seedloom benchmark peer`, as a program of its own so that its fairness can be judged. It
follows Ray's guide to batch inference (`map_batches` with a class, an `ActorPoolStrategy`, the batch size of
the model) and diffusers' own pipeline, and knows nothing of Seedloom. Every image has a seed and a key of its
own, and blocks are cut to the batch size, without which actors get batches of any size. `record` is what the
benchmark adds, here as on the other side.

With `--checkpoint` it uses Ray Data's checkpoints (beta): they filter rows where they are read from files, so
the prompts come from Parquet instead of from a list.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch


def record(keys: list[str]) -> None:
    """Tell the benchmark that these images were generated now."""
    with open(os.environ["SEEDLOOM_PEER_LOG"], "a") as log:
        log.write(json.dumps([time.time(), keys]) + "\n")


class Painter:
    """A diffusers pipeline, loaded once in each actor."""

    def __init__(self, model: str, steps: int, guidance: float):
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        images = self.pipe(list(batch["txt"]), generator=generators, **self.settings).images
        record(list(batch["__key__"]))
        return {
            "__key__": batch["__key__"],
            "jpg": (images * 255).round().astype(np.uint8),
            "cls": batch["cls"],
            "txt": batch["txt"],
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", help="JSON: a list of rows with __key__, txt, cls, seed")
    parser.add_argument("out")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--gpus-per-worker", type=float, required=True)
    parser.add_argument("--checkpoint", help="folder for Ray Data's checkpoints")
    given = parser.parse_args()

    ray.init()
    rows = json.loads(Path(given.prompts).read_text())
    if given.checkpoint:
        from ray.data.checkpoint import CheckpointConfig

        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="__key__", checkpoint_path=given.checkpoint
        )
        prompts = Path(given.prompts).with_suffix(".parquet")
        if not prompts.exists():
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), prompts)
        # a small file is read as one block, which one actor would get; this cuts it while it streams
        dataset = ray.data.read_parquet(str(prompts)).repartition(target_num_rows_per_block=given.batch)
    else:
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // given.batch))
    dataset.map_batches(
        Painter,
        fn_constructor_args=(given.model, given.steps, given.guidance),
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        batch_size=given.batch,
        num_gpus=given.gpus_per_worker or None,
        num_cpus=None if given.gpus_per_worker else 1,
    ).write_webdataset(given.out, min_rows_per_file=given.shard)


if __name__ == "__main__":
    main()
