"""Fetch model folders from the Hugging Face hub, and explain its errors."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from .._core.logs import logger

#: Files of a model folder.
FILES = ("card.json", "genes.csv", "weights.safetensors", "README.md")
PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)

#: Seconds after which the hub is taken as unreachable; its client would retry for half a minute.
_TIMEOUT = 2.0

LOGIN = "log in by `hf auth login` (`huggingface-cli login` before huggingface_hub 1.0) or set HF_TOKEN"
OFFLINE = (
    "A machine without network reads the hub's cache: fetch once elsewhere and copy that folder, ~/.cache/huggingface, "
    "or set HF_HOME to a shared folder."
)


def fetch_folder(address: str) -> tuple[Path, str]:
    """Fetch a model folder from ``"hf://owner/name[@revision]"`` or the cache; return the folder, and the address with commit.

    The content of the folder is not checked.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or ".." in address or "--" in found["repository"]:
        raise ValueError(
            f"`model` {address!r} is not an address on the hub; write 'hf://owner/name' or 'hf://owner/name@revision', such as "
            "'hf://my-lab/he2gene-lung@v1'"
        )
    from huggingface_hub import snapshot_download

    repository, revision = found["repository"], found["revision"]
    page = f"https://huggingface.co/{repository}"
    try:
        with quick_offline():
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client and its transport each raise their own types
        kind = kind_of(error)
        if kind == "gated":
            raise RuntimeError(
                f"`model` {address!r} is gated: accept its conditions at {page}, wait for access if it is granted "
                f"by hand, and {LOGIN}"
            ) from error
        if kind == "absent":
            suffix = f" at revision {revision!r}" if revision else ""
            raise ValueError(
                f"`model` {address!r}: {page}{suffix} does not exist or is private; if it is private, {LOGIN}"
            ) from error
        if isinstance(error, ValueError):
            raise ValueError(f"`model` {address!r}: {error}") from error
        raise RuntimeError(
            f"`model` {address!r} is not on this machine and could not be fetched ({error}). {OFFLINE}"
        ) from error
    resolved = f"{PREFIX}{repository}@{folder.name}"
    if revision is None:
        logger.warning(
            "`model` %r has no revision: using %r; pass that address to get the same model again", address, resolved
        )
    return folder, resolved


@contextlib.contextmanager
def quick_offline() -> Iterator[None]:
    """Let the hub's client read only its cache if the hub cannot be reached, instead of retrying."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _reachable(address: str) -> bool:
    """Return whether a server, or its proxy, accepts connections before the timeout."""
    server = urlsplit(address)
    proxies = getproxies()
    proxy = proxies.get(server.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(server.hostname or ""):
        server = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    found: list[bool] = []

    def connect() -> None:
        default = 80 if server.scheme == "http" else 443
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((server.hostname, server.port or default), _TIMEOUT).close()
            found.append(True)

    # Name resolution has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    return bool(found)


def kind_of(error: BaseException) -> str:
    """Classify an error of the hub: ``"gated"``, ``"absent"``, ``"offline"`` or ``"other"``."""
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
    """Return whether the hub's cache holds a file of the main branch of a repository."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, filename), str)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
