"""Settings of a session: where data lies, which device computes, how much memory a result may take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _default_data_dir() -> Path | None:
    value = os.environ.get("HE2GENE_DATA_DIR")
    return Path(value).expanduser() if value else None


@dataclass
class Settings:
    """Session-wide settings, at ``hg.settings``.

    Attributes
    ----------
    data_dir
        Folder that holds ``her2st/`` (see :func:`he2gene_sc.datasets.her2st`). ``None``: the environment variable
        ``HE2GENE_DATA_DIR``, read at each use, and after it the download cache.
    device
        Device of a run when none is asked for: ``"auto"`` takes CUDA, then Apple's MPS, then the CPU.
    show_progress_bar
        Whether long runs show a bar when the call does not say.
    memory_limit
        Bytes that a dense layer may take. A predicted layer above it is a dask array that is computed when it is read. A table
        that we make has a copy of the layer as ``X``, or an empty ``X`` if both together would pass the limit.
    """

    data_dir: str | Path | None = None
    device: str = "auto"
    show_progress_bar: bool = True
    memory_limit: int = 2 * 1024**3

    def __setattr__(self, name: str, value: Any) -> None:
        from ._core import validate

        validate.key_in(name, self.__annotations__, "hg.settings", what="a setting")
        if name == "memory_limit":
            validate.in_range(value, name, least=0, what="a number of bytes")
        elif name == "show_progress_bar":
            validate.flag(value, name)
        elif name == "device" and not hasattr(value, "type"):
            validate.name(value, name)
        elif name == "data_dir" and value is not None:
            validate.folder_or_file(value, name)
        object.__setattr__(self, name, value)

    def resolved_data_dir(self) -> Path | None:
        """Return the folder that holds local data, or ``None`` when neither the setting nor the variable is set."""
        return Path(self.data_dir).expanduser() if self.data_dir is not None else _default_data_dir()


settings = Settings()
