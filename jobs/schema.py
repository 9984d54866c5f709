"""`seedloom schema`: the JSON schema of the config, for editors and programs."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of the config."""
    import json

    from pipeline.config import BuildConfig

    print(json.dumps(BuildConfig.model_json_schema(), indent=2))


if __name__ == "__main__":
    from jobs.entry import run

    run(schema)
