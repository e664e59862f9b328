"""Settings of a session: data folder, device, progress bars and memory limit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """Session-wide settings, available as ``hg.settings``.

    Attributes
    ----------
    data_dir
        Folder that contains ``her2st/`` (see :func:`he2gene_sc.datasets.her2st`). ``None`` uses the environment variable
        ``HE2GENE_DATA_DIR``, which is read at each use, or else the download cache.
    device
        Default device of a run: ``"auto"`` chooses CUDA, then Apple's MPS, then the CPU.
    show_progress_bar
        Whether long runs show a progress bar by default.
    memory_limit
        Largest size of a dense layer in bytes. A larger predicted layer is a dask array, which is computed when it is read. A
        table created by this package has a copy of the layer as ``X``, or an empty ``X`` if both would exceed the limit.
    n_readers
        Number of threads that read and decode the image while the device encodes. ``None`` uses one on a CPU, whose cores the
        encoder needs, and on a GPU one per core, at most 8. Each holds about 50 MB.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.settings.memory_limit = 4 * 1024**3
    """

    data_dir: str | Path | None = None
    device: str = "auto"
    show_progress_bar: bool = True
    memory_limit: int = 2 * 1024**3
    n_readers: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        from ._core import validate

        validate.key_in(name, self.__annotations__, "hg.settings", what="a setting")
        if name == "memory_limit":
            validate.in_range(value, name, least=0, what="a number of bytes")
        elif name == "n_readers" and value is not None:
            validate.whole_number(value, name)
        elif name == "show_progress_bar":
            validate.flag(value, name)
        elif name == "device" and not hasattr(value, "type"):
            validate.name(value, name)
        elif name == "data_dir" and value is not None:
            validate.folder_or_file(value, name)
        object.__setattr__(self, name, value)

    def resolved_data_dir(self) -> Path | None:
        """Return the folder that holds local data, or ``None`` if neither the setting nor the variable is set."""
        value = self.data_dir or os.environ.get("HE2GENE_DATA_DIR")
        return Path(value).expanduser() if value else None


settings = Settings()
