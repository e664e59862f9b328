"""Check that arguments and results of public functions have types for a user's type checker."""

import json
import subprocess
import sys
from pathlib import Path

import he2gene_sc as hg

CODE = """\
import he2gene_sc as hg
from spatialdata import SpatialData


def main(sdata: SpatialData) -> None:
    hg.tl.predict(1)
    reveal_type(hg.get.genes(sdata))
"""


def test_a_type_checker_rejects_a_wrong_argument_and_knows_the_result(tmp_path):
    (tmp_path / "main.py").write_text(CODE)
    config = {"include": ["main.py"], "extraPaths": [str(Path(hg.__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong, revealed = json.loads(found.stdout)["generalDiagnostics"]
    assert wrong["severity"] == "error"
    assert wrong["range"]["start"]["line"] == 5
    assert '"Literal[1]" cannot be assigned to parameter "sdata"' in wrong["message"]
    assert revealed["message"] == 'Type of "hg.get.genes(sdata)" is "list[str]"'
