"""Models on the Hugging Face hub: `hf-hub:owner/name`, or `hf-hub:owner/name@revision`.

The workers of a node share the hub client's cache. The client downloads a file under a lock of the cache, and
who waited for the lock finds the file there, so a node downloads it once however many workers ask; a download
that was cut off goes on. Files are fetched by name, never a whole repository, and never a pickle.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path, PurePosixPath

from schemas.errors import UserError
from stages.backbones import files

PREFIX = "hf-hub:"


def local_folder(model: str, what: str, allowed: str) -> Path | None:
    """The folder that a model's name is, or None where the name is an id on the hub.

    Raises `UserError`, which `allowed` ends, for what is neither.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.is_absolute() or model[0] in ".~" or model.count("/") != 1:
        raise UserError(f"{what}: no such folder; {allowed}")
    return None


@cache
def fetch(name: str, patterns: tuple[str, ...], what: str) -> Path:
    """The folder on this machine with the files that match, of owner/name or owner/name@revision."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises its own, httpx's and the system's
        raise UserError(f"{what} cannot be downloaded: {_why(error, repository, revision)}") from error


def fetch_weights(name: str, folder: Path, file: str, what: str) -> None:
    """Add one weights file to the folder that `fetch` gave, of the same commit."""
    repository, commit = name.partition("@")[0], folder.name
    fetch(f"{repository}@{commit}", (file,), what)
    if not (folder / file).is_file():
        raise UserError(f"{what}: {repository} has no {file}{_pickles_beside(file, repository, commit)}")


def _pickles_beside(file: str, repository: str, commit: str) -> str:
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(repository, revision=commit)
    except Exception:  # only the hint is lost
        return ""
    place = PurePosixPath(file).parent
    beside = [path.name for path in map(PurePosixPath, listed) if path.parent == place]
    return files.only_pickled([name for name in beside if name.endswith(files.PICKLES)])


def _why(error: Exception, repository: str, revision: str) -> str:
    """What is wrong and what to do, in one line."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return (
                f"the owner of {repository} wants terms accepted: do so on its page on the hub, then set"
                " HF_TOKEN or run `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"the hub has no {repository}, or it is private: check the name, and for a private one set"
                " HF_TOKEN or run `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision}: give a branch, tag or commit that it has"
        case errors.HFValidationError():
            return f"{repository!r} is no hub id: give owner/name"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return (
                f"the hub cannot be reached, and {repository} is not whole in this machine's cache: connect,"
                f" or run `hf download {repository}` where there is a network and give the folder"
            )
    return f"{files.first_line(error)}; run again to go on with the download"
