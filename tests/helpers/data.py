"""Path of the real sections, if available."""

import os
from pathlib import Path

DATA_DIR = os.environ.get("HE2GENE_DATA_DIR")
HAS_DATA = DATA_DIR is not None and (Path(DATA_DIR) / "her2st").is_dir()
REQUIRE_DATA = os.environ.get("HE2GENE_REQUIRE_DATA") == "1"
