"""The Hugging Face hub: fetching model folders, and what to do when it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_FILES = ("card.json", "genes.csv", "weights.safetensors", "README.md")

LOGIN = "log in by `hf auth login` (`huggingface-cli login` before huggingface_hub 1.0) or set HF_TOKEN"
OFFLINE = (
    "A machine without network reads the hub's cache: fetch once elsewhere and copy that folder, ~/.cache/huggingface, "
    "or let HF_HOME name a shared one."
)


def is_address(model: object) -> bool:
    """Whether this names a model on the hub."""
    return isinstance(model, str) and model.startswith(_PREFIX)


def fetch_folder(address: str) -> Path:
    """Fetch the four files of a model folder, or find them in the hub's cache.

    Parameters
    ----------
    address
        ``"hf://owner/name"`` or ``"hf://owner/name@revision"``: a branch, tag or commit.

    Returns
    -------
    pathlib.Path
        The folder in the hub's cache; nothing in it has been checked.

    Raises
    ------
    ValueError
        If the address is malformed, or there is no such repository or revision.
    RuntimeError
        If the repository is gated, or the hub cannot be reached and the cache does not hold the model.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or ".." in address or "--" in found["repository"]:
        raise ValueError(
            f"`model` {address!r} is no address on the hub; write 'hf://owner/name' or 'hf://owner/name@revision', such as "
            "'hf://my-lab/he2gene-lung@v1'"
        )
    from huggingface_hub import snapshot_download

    repository, revision = found["repository"], found["revision"]
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub client and its transport each raise their own types
        kind = kind_of(error)
        if kind == "gated":
            raise RuntimeError(
                f"`model` {address!r} is gated: accept its conditions at {page}, wait for access where that is granted "
                f"by hand, and {LOGIN}"
            ) from error
        if kind == "absent":
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(f"`model` {address!r}: there is no {page}{at}, or it is private: then {LOGIN}") from error
        if isinstance(error, ValueError):
            raise ValueError(f"`model` {address!r}: {error}") from error
        raise RuntimeError(
            f"`model` {address!r} is not on this machine and could not be fetched ({error}). {OFFLINE}"
        ) from error


def kind_of(error: BaseException) -> str:
    """Tell why the hub did not deliver: ``"gated"``, ``"absent"``, ``"offline"`` or ``"other"``."""
    from huggingface_hub import errors

    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError) or status == 403:
            return "gated"
        if isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return "absent"
        if isinstance(cause, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
            return "offline"
    return "other"


def is_cached(repository: str, filename: str) -> bool:
    """Whether the hub's cache holds a file of a repository's main branch."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, filename), str)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
