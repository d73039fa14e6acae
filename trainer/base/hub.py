"""A model of the Hugging Face hub, or of a mirror that HF_ENDPOINT names. Safetensors only."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from thumbwheel import errors, files
from trainer.base.cache import Entry
from trainer.base.folder import check_folder
from trainer.base.progress import Progress

# Weights as safetensors, configuration, tokenizer; never pickles or code, nothing of sub-folders. Some repositories
# carry the weights a second time, consolidated.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_UNWANTED = ["consolidated*", "*/*"]


def fetch(repo: str, revision: str, cache: Path, progress: Progress) -> Path:
    """The folder of `repo` at `revision` in `cache`. Errors as `trainer.base.fetch`.

    A revision that moves, such as main, is fetched once and then kept: name a commit for another state.
    """
    key = f"{repo}@{revision}".replace("/", "--")
    entry = Entry(cache, key, repo.rpartition("/")[2])

    def fill(folder: Path) -> None:
        downloads = entry.partial / "hub"
        _download(repo, revision, downloads, progress)
        shutil.rmtree(downloads / ".cache", ignore_errors=True)
        check_folder(downloads)
        downloads.rename(folder)

    return entry.get(fill)


def _download(repo: str, revision: str, folder: Path, progress: Progress) -> None:
    """Downloads into `folder`; what is there whole already is not downloaded again."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise errors.FailedPrecondition(
            "The Python package huggingface_hub is not installed.", remedy="Type: pip install 'thumbwheel[trainer]'"
        )
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours is shown instead
    folder.mkdir(exist_ok=True)
    try:
        plan = snapshot_download(
            repo,
            revision=revision,
            local_dir=folder,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            dry_run=True,
        )
        sizes = {file.filename: file.file_size or 0 for file in plan}
        left = sum(sizes[file.filename] for file in plan if file.will_download)
        files.require_space(folder, left, repo)
        with files.space_errors(folder, left, repo), progress.step(f"Downloading {repo}", folder, sum(sizes.values())):
            # The commit that was planned, should the branch move meanwhile.
            snapshot_download(
                repo,
                revision=plan[0].commit_hash if plan else revision,
                local_dir=folder,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
    except (
        DryRunError,
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        HTTPError,
        ConnectionError,
    ) as error:
        raise _translate(error, repo, revision) from error
    for name, size in sizes.items():
        # The hub's client takes a folder that is not empty for a whole one when the connection goes.
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise errors.Unavailable(f"{repo}: {name} was not downloaded whole.", remedy=_OFFLINE)


_OFFLINE = (
    "Connect and try again (what is done is kept), set HF_ENDPOINT to a mirror, or copy the model here and type: "
    "thumbwheel model fetch PATH"
)


def _translate(error: Exception, repo: str, revision: str) -> errors.ThumbwheelError:
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, DryRunError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return errors.MissingModel(
            f"{repo} is only for those who have accepted its terms.",
            remedy="Accept them on its page, then type: hf auth login",
        )
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        return errors.MissingModel(
            f"The hub has no model {repo} at {revision}, or it is private.",
            remedy="Check the id, or type: hf auth login. A folder works too: thumbwheel model fetch PATH",
        )
    return errors.Unavailable(f"The hub could not be reached for {repo}: {error}", remedy=_OFFLINE)
