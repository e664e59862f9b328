"""Odd cohorts: manifests, records of finished slides, outputs and summaries."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import he2gene_sc as hg
from tests.helpers.odd.harness import Odd, tiny

MPP = 4.0
DONE = {"status": ["predicted"], "spots": [6], "mpp": [MPP]}


class Failed(ValueError):
    """Error of a slide, as in its row of the table."""

    def format_message(self) -> str:
        return str(self)


@dataclass
class Case:
    """A call of ``hg.cohort.predict``, its expected result, and files that must not change if it raises."""

    paths: Any
    options: dict[str, Any] = field(default_factory=dict)
    expected: Any = None
    kept: list[Path] = field(default_factory=list)
    any_status: bool = False  # whether it may be predicted again or skipped


@cache
def _model() -> Any:
    encoder, model = tiny()
    place = Path(mkdtemp(prefix="he2gene-odd-")) / "model"
    model.save(place)
    return hg.models.load(place, encoder=encoder)


@cache
def _made() -> Path:
    """Make two stores and an image, none predicted."""
    place = Path(mkdtemp(prefix="he2gene-odd-"))
    for name, seed in (("A", 0), ("B", 1)):
        hg.datasets.toy((2, 3), mpp=MPP, seed=seed).write(place / f"{name}.zarr")
    pixels = hg.datasets.toy((2, 3), mpp=MPP)["he"].transpose("y", "x", "c").to_numpy()
    Image.fromarray(pixels).save(place / "C.png")
    return place


@cache
def _finished() -> Path:
    """Make the same, predicted, with the store of the image beside it."""
    place = Path(shutil.copytree(_made(), mkdtemp(prefix="he2gene-odd-") + "/slides"))
    frame = _predict([place / "A.zarr", place / "C.png"], mpp=MPP)
    assert (frame["status"] == "predicted").all(), frame["error"].tolist()
    return place


def _copy(source: Path) -> Path:
    """Copy files with their times, to a folder that no record names."""
    return Path(shutil.copytree(source, mkdtemp(prefix="he2gene-odd-") + "/slides"))


def _predict(slides: Any, **options: Any) -> pd.DataFrame:
    import dask
    from distributed import Client

    # Close the client each time: an open client would compute the dask arrays of other inputs.
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client,
    ):
        return hg.cohort.predict(slides, client, **{"model": _model(), "show_progress_bar": False, **options})


def _told(frame: pd.DataFrame) -> dict[str, Any]:
    for row in frame.to_dict("records"):
        if row["status"] == "failed":
            # Errors of libraries would be raised in a notebook.
            kinds = ("ValueError", "TypeError", "OSError", "FileNotFoundError", "FileExistsError", "PermissionError")
            known = str(row["error"]).startswith((*kinds, "IsADirectoryError", "NotADirectoryError"))
            raise (Failed if known else RuntimeError)(row["error"])
    return {"status": list(frame["status"]), "spots": list(frame["spots"]), "mpp": list(frame["mpp"])}


def _odd(name: str, make: Callable[[Path], Case], source: Callable[[], Path] = _made, harmless: bool = False) -> Odd:
    def ready() -> tuple[Callable[[], Any], list[Any], Any]:
        _model()
        place = _copy(source())
        case = make(place)

        def call() -> dict[str, Any]:
            found = _told(_predict(case.paths, **case.options))
            return found | ({"status": case.expected["status"]} if case.any_status else {})

        return call, case.kept, case.expected

    return Odd(name, ready, harmless)


# --- Manifests -------------------------------------------------------------------------------------------------------

#: Unambiguous manifests of one slide, ``A.zarr``.
READ: dict[str, str | bytes] = {
    "plain": "path,mpp\nA.zarr,4\n",
    "with a byte order mark": "\ufeffpath,mpp\nA.zarr,4\n",
    "with line ends of Windows": "path,mpp\r\nA.zarr,4\r\n",
    "with line ends of old Macs": "path,mpp\rA.zarr,4\r",
    "without a last line end": "path,mpp\nA.zarr,4",
    "with blanks around cells": " path , mpp \n A.zarr , 4 \n",
    "with tabs around cells": "path\t,\tmpp\nA.zarr\t,\t4\n",
    "with empty lines": "\n\npath,mpp\n\nA.zarr,4\n\n\n",
    "with lines of commas": "path,mpp\n,\nA.zarr,4\n,\n,\n",
    "with lines of blanks": "path,mpp\n   \nA.zarr,4\n  ,  \n",
    "with an empty column at the end": "path,mpp,\nA.zarr,4,\n",
    "with empty columns of Excel": "path,mpp,,,\nA.zarr,4,,,\n,,,,\n",
    "with quoted cells": '"path","mpp"\n"A.zarr","4"\n',
    "with an empty cell": "path,mpp,image_key\nA.zarr,4,\n",
    "with a short row": "path,mpp,image_key\nA.zarr,4\n",
    "with a path from here": "path,mpp\n./A.zarr,4\n",
    "with a path that ends in a slash": "path,mpp\nA.zarr/,4\n",
    "with a path that goes up": "path,mpp\n../slides/A.zarr,4\n",
    "with µm/px and an exponent": "path,mpp\nA.zarr,4e0\n",
    "with a whole number as a fraction": "path,mpp,batch_size\nA.zarr,4,8.0\n",
    "with a flag in capital letters": "path,mpp,exact\nA.zarr,4,FALSE\n",
    "with blanks that do not break": "path,mpp\nA.zarr\u00a0,\u00a04\n",
    "with the patient of the table": "path,mpp,patient\nA.zarr,4,toy\n",
    "with a patient and blanks": "path,mpp,patient\nA.zarr,4, toy \n",
    "with a quoted line": 'path,mpp\n"A.zarr",4\n',
    "with UTF-16 and its mark": "path,mpp\nA.zarr,4\n".encode("utf-16"),
}

#: Manifests that must be refused.
REFUSED: dict[str, str | bytes] = {
    "with semicolons": "path;mpp\nA.zarr;4\n",
    "with semicolons and decimal commas": "path;mpp\nA.zarr;4,0\n",
    "of 0 bytes": b"",
    "of line ends": "\n\n\n",
    "of a byte order mark alone": "\ufeff",
    "with a header alone": "path,mpp\n",
    "with a header and empty rows": "path,mpp\n,\n,\n",
    "without a header": "A.zarr,4\n",
    "whose column is Path": "Path,mpp\nA.zarr,4\n",
    "whose column is slide": "slide,mpp\nA.zarr,4\n",
    "whose column is filename": "filename,mpp\nA.zarr,4\n",
    "with decimal commas": "path,mpp\nA.zarr,4,0\n",
    "with decimal commas, quoted": 'path,mpp\nA.zarr,"4,0,1"\n',
    "with a cell too many in one row": "path,mpp\nA.zarr,4\nB.zarr,4,x\n",
    "with a cell too many in each row": "path,mpp\nx,A.zarr,4\n",
    "with µm/px nan": "path,mpp\nA.zarr,nan\n",
    "with µm/px NaN": "path,mpp\nA.zarr,NaN\n",
    "with µm/px 0": "path,mpp\nA.zarr,0\n",
    "with µm/px -0.5": "path,mpp\nA.zarr,-0.5\n",
    "with µm/px 1e-9": "path,mpp\nA.zarr,1e-9\n",
    "with µm/px 1e9": "path,mpp\nA.zarr,1e9\n",
    "with µm/px and a unit": "path,mpp\nA.zarr,4 µm\n",
    "with µm/px and an underscore": "path,mpp\nA.zarr,0_4\n",
    "with µm/px as a fraction": "path,mpp\nA.zarr,1/2\n",
    "with µm/px true": "path,mpp\nA.zarr,true\n",
    "with µm/px #N/A": "path,mpp\nA.zarr,#N/A\n",
    "with patient nan": "path,mpp,patient\nA.zarr,4,nan\n",
    "with patient NA": "path,mpp,patient\nA.zarr,4,NA\n",
    "with patient None": "path,mpp,patient\nA.zarr,4,None\n",
    "with patient #N/A": "path,mpp,patient\nA.zarr,4,#N/A\n",
    "with another patient than the table": "path,mpp,patient\nA.zarr,4,P1\n",
    "with patients that differ in case": "path,mpp,patient\nC.png,4,P1\nD.png,4,p1\n",
    "with batches of 1_0": "path,mpp,batch_size\nA.zarr,4,1_0\n",
    "with batches of nan": "path,mpp,batch_size\nA.zarr,4,nan\n",
    "with batches of inf": "path,mpp,batch_size\nA.zarr,4,inf\n",
    "with batches of -1": "path,mpp,batch_size\nA.zarr,4,-1\n",
    "with a flag 1": "path,mpp,exact\nA.zarr,4,1\n",
    "with a lattice nan": "path,mpp,lattice\nA.zarr,4,nan\n",
    "with a pitch nan": "path,mpp,pitch_um\nC.png,4,nan\n",
    "with a pitch 0": "path,mpp,pitch_um\nC.png,4,0\n",
    "with a pitch -1": "path,mpp,pitch_um\nC.png,4,-1\n",
    "with a pitch wider than the slide": "path,mpp,pitch_um\nC.png,4,1e7\n",
    "with an unknown method": "path,mpp,tissue_method\nC.png,4,OTSU!\n",
    "with an unknown image": "path,mpp,image_key\nA.zarr,4,hires\n",
    "with an unknown table": "path,mpp,table_key\nA.zarr,4,other\n",
    "with unknown spots": "path,mpp,shapes_key\nA.zarr,4,cells\n",
    "with an unknown system": "path,mpp,coordinate_system\nA.zarr,4,um\n",
    "with an unknown gene": "path,mpp,genes\nA.zarr,4,NOGENE\n",
    "with genes of commas": 'path,mpp,genes\nA.zarr,4,";;,"\n',
    "with an unknown model": "path,mpp,model\nA.zarr,4,nowhere\n",
    "with a column sdata": "path,sdata\nA.zarr,x\n",
    "with a column copy": "path,copy\nA.zarr,true\n",
    "with a column overwrite": "path,overwrite\nA.zarr,true\n",
    "with a column status": "path,status\nA.zarr,predicted\n",
    "with a column twice": "path,mpp,mpp\nA.zarr,4,3\n",
    "with a column twice but for blanks": "path,mpp, mpp\nA.zarr,4,3\n",
    "with a column path twice": "path,path\nA.zarr,B.zarr\n",
    "with a nameless column that is filled": "path,mpp,\nA.zarr,4,note\n",
    "with a path of blanks": "path,mpp\n  ,4\n",
    "with a path to nothing": "path,mpp\nZ.zarr,4\n",
    "with a path to an empty folder": "path,mpp\nempty,4\n",
    "with a path to the manifest": "path,mpp\nm.csv,4\n",
    "with a path to its folder": "path,mpp\n.,4\n",
    "with a path that is a URL": "path,mpp\nhttps://example.org/A.svs,4\n",
    "with a path of Windows": "path,mpp\nC:\\scans\\A.svs,4\n",
    "with a path that is too long": f"path,mpp\n{'a' * 5000}.svs,4\n",
    "with a file name that is too long": f"path,mpp\n{'a' * 252}.svs,4\n",
    "with a NUL in the path": "path,mpp\nA\0.svs,4\n",
    "with a newline in the path": 'path,mpp\n"A\n.svs",4\n',
    "with a slide twice": "path,mpp\nA.zarr,4\nA.zarr,4\n",
    "with a slide twice, written otherwise": "path,mpp\nA.zarr,4\n./x/../A.zarr/,4\n",
    "with a store and a link to it": "path,mpp\nA.zarr,4\nlink.zarr,4\n",
    "with two slides of one name": "path,mpp\nC.png,4\nC.tif,4\n",
    "with an output that is a slide": "path,mpp,output\nA.zarr,4,B.zarr\nB.zarr,4,D.zarr\n",
    "with an output in the slide": "path,mpp,output\nA.zarr,4,A.zarr/tables/out.zarr\n",
    "with an output in another slide": "path,mpp,output\nC.png,4,A.zarr/out.zarr\n",
    "with an output that is the image": "path,mpp,output\nC.png,4,C.png\n",
    "with an output that is the manifest": "path,mpp,output\nC.png,4,m.csv\n",
    "with an output that is its folder": "path,mpp,output\nC.png,4,.\n",
    "with an output below a file": "path,mpp,output\nC.png,4,m.csv/out.zarr\n",
    "with an output in another output": "path,mpp,output\nC.png,4,o.zarr\nA.zarr,4,o.zarr/x.zarr\n",
    "with an output that is another store": "path,mpp,output\nC.png,4,B.zarr\n",
    "with an output for two slides": "path,mpp,output\nA.zarr,4,o.zarr\nB.zarr,4,o.zarr\n",
    "with a NUL in the output": "path,mpp,output\nC.png,4,o\0.zarr\n",
    "in Latin-1": "path,mpp,patient\nC.png,4,M\xfcller\n".encode("latin-1"),
    "that is an Excel file": b"PK\x03\x04" + bytes(range(256)) * 4,
    "that is a picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "that is JSON": '[{"path": "A.zarr"}]\n',
    "that ends in a quote": 'path,mpp\n"A.zarr,4\n',
    "with a quote in a cell": 'path,mpp\nA"x".zarr,4\n',
}


def _manifest(name: str, content: str | bytes, expected: Any) -> Callable[[Path], Case]:
    def make(place: Path) -> Case:
        (place / "empty").mkdir()
        (place / "link.zarr").symlink_to("A.zarr")
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        kept = [place / "A.zarr", place / "B.zarr", place / "C.png", place / name] if expected is None else []
        return Case(place / name, {}, expected, kept)

    return make


#: Manifests with another suffix.
ENDINGS = ("m.xlsx", "m.xls", "m.txt", "m", "m.json", "m.parquet", "m.csv.gz", "m.ods")


def _frames(place: Path) -> dict[str, tuple[Any, bool]]:
    path = str(place / "A.zarr")
    return {
        "a DataFrame": (pd.DataFrame({"path": [path], "mpp": [4.0]}), True),
        "a DataFrame of Paths": (pd.DataFrame({"path": [place / "A.zarr"], "mpp": [4]}), True),
        "a DataFrame of strings": (pd.DataFrame({"path": pd.array([path], "string"), "mpp": ["4"]}), True),
        "a DataFrame of categories": (pd.DataFrame({"path": pd.Categorical([path]), "mpp": [4.0]}), True),
        "a DataFrame with pd.NA": (pd.DataFrame({"path": [path], "mpp": [4.0], "image_key": [pd.NA]}), True),
        "a DataFrame with NaT": (pd.DataFrame({"path": [path], "mpp": [4.0], "image_key": [pd.NaT]}), True),
        "a DataFrame of whole floats": (pd.DataFrame({"path": [path], "mpp": [4.0], "batch_size": [8.0]}), True),
        "a DataFrame of nullable integers": (
            pd.DataFrame({"path": [path], "mpp": [4.0], "batch_size": pd.array([8], "Int64")}),
            True,
        ),
        "a DataFrame of float32": (pd.DataFrame({"path": [path], "mpp": np.array([4.0], np.float32)}), True),
        "a DataFrame of flags": (pd.DataFrame({"path": [path], "mpp": [4.0], "exact": [False]}), True),
        "a DataFrame with a list of genes": (pd.DataFrame({"path": [path], "mpp": [4.0], "genes": [None]}), True),
        "a DataFrame with an odd index": (pd.DataFrame({"path": [path], "mpp": [4.0]}, index=["x"]), True),
        "a list": ([path], True),
        "a tuple": ((path,), True),
        "a generator": ((each for each in [path]), True),
        "a Series": (pd.Series([path]), True),
        "an array": (np.array([path]), True),
        "a text": (path, True),
        "an empty DataFrame": (pd.DataFrame(), False),
        "a DataFrame without rows": (pd.DataFrame({"path": []}), False),
        "a DataFrame of columns that are numbers": (pd.DataFrame([[path, 4.0]]), False),
        "a DataFrame of two levels of columns": (pd.DataFrame({("path", "x"): [path]}), False),
        "a DataFrame with a column twice": (
            pd.DataFrame([[path, 1.0, 2.0]], columns=["path", "mpp", "mpp"]),
            False,
        ),
        "a DataFrame whose path is a number": (pd.DataFrame({"path": [3]}), False),
        "a DataFrame whose path is NaN": (pd.DataFrame({"path": [np.nan]}), False),
        "a DataFrame whose path is a list": (pd.DataFrame({"path": [[path]]}), False),
        "a DataFrame whose path is bytes": (pd.DataFrame({"path": [path.encode()]}), False),
        "a DataFrame whose mpp is infinite": (pd.DataFrame({"path": [path], "mpp": [np.inf]}), False),
        "a DataFrame whose mpp is a flag": (pd.DataFrame({"path": [path], "mpp": [True]}), False),
        "a DataFrame whose mpp is a list": (pd.DataFrame({"path": [path], "mpp": [[4.0]]}), False),
        "a DataFrame whose mpp is complex": (pd.DataFrame({"path": [path], "mpp": [4 + 0j]}), False),
        "a DataFrame whose mpp is a date": (pd.DataFrame({"path": [path], "mpp": [pd.Timestamp(0)]}), False),
        "a DataFrame whose batch_size is 8.5": (pd.DataFrame({"path": [path], "batch_size": [8.5]}), False),
        "a DataFrame whose flag is a float": (pd.DataFrame({"path": [path], "exact": [1.0]}), False),
        "a DataFrame whose genes are numbers": (pd.DataFrame({"path": [path], "genes": [[1, 2]]}), False),
        "a DataFrame whose patient is a list": (pd.DataFrame({"path": [path], "patient": [["P1"]]}), False),
        "a mapping": ({"path": path}, False),
        "None": (None, False),
        "a number": (3, False),
        "bytes": (path.encode(), False),
        "an object": (object(), False),
        "a list of None": ([None], False),
        "a list of lists": ([[path]], False),
        "a list of numbers": ([1, 2], False),
        "an empty list": ([], False),
        "an empty text": ("", False),
        "a text with a NUL": ("a\0b", False),
        "a set of two names": ([path, path + "/"], False),
    }


def _frame(what: str) -> Odd:
    def make(place: Path) -> Case:
        given, harmless = _frames(place)[what]
        return Case(given, {}, DONE if harmless else None, [place])

    return _odd(f"manifest / {what}", make, harmless=_frames(Path())[what][1])


# --- Options ---------------------------------------------------------------------------------------------------------


def _options(place: Path) -> dict[str, dict[str, Any]]:
    (place / "notes.csv").write_text("a,b\n1,2\n")
    (place / "empty.csv").write_text("")
    return {
        "output_dir is a file": {"output_dir": place / "C.png"},
        "output_dir is in a file": {"output_dir": place / "C.png" / "out"},
        "output_dir is in the slide": {"output_dir": place / "A.zarr" / "tables"},
        "output_dir is empty": {"output_dir": ""},
        "output_dir is a number": {"output_dir": 3},
        "output_dir has a NUL": {"output_dir": "a\0b"},
        "output_dir is too long": {"output_dir": "a" * 5000},
        "summary is the slide": {"summary": place / "A.zarr"},
        "summary is in the slide": {"summary": place / "A.zarr" / "summary.csv"},
        "summary is another table": {"summary": place / "notes.csv"},
        "summary is an empty file": {"summary": place / "empty.csv"},
        "summary is text": {"summary": place / "s.txt"},
        "summary has no ending": {"summary": place / "s"},
        "summary is in no folder": {"summary": place / "none" / "s.csv"},
        "summary is empty": {"summary": ""},
        "summary is a number": {"summary": 3},
        "summary has a NUL": {"summary": "a\0b.csv"},
        "summary is too long": {"summary": "a" * 300 + ".csv"},
        "summary is a link to the slide": {"summary": place / "link.csv"},
        "n_workers is 1 beside a client": {"n_workers": 1},
        "n_workers is nan": {"n_workers": float("nan")},
        "n_workers is 1.5": {"n_workers": 1.5},
        "overwrite is text": {"overwrite": "yes"},
        "keep_images is None": {"keep_images": None},
        "keep_images is False in place": {"keep_images": False},
        "show_progress_bar is text": {"show_progress_bar": "no"},
        "mpp is nan": {"mpp": float("nan")},
        "mpp is text": {"mpp": "4"},
        "mpp names other spots": {"mpp": {"cells": 4.0}},
        "pitch_um is nan": {"pitch_um": float("nan")},
        "pitch_um is text": {"pitch_um": "100"},
        "lattice is nan": {"lattice": float("nan")},
        "batch_size is nan": {"batch_size": float("nan")},
        "batch_size is 0": {"batch_size": 0},
        "genes is text": {"genes": "ERBB2"},
        "genes is an empty text": {"genes": ""},
        "tissue_method is None": {"tissue_method": None},
        "patient is for all": {"patient": "P1"},
        "path is for all": {"path": "x"},
        "sdata is given": {"sdata": 1},
        "copy is given": {"copy": True},
        "model is a file": {"model": place / "C.png"},
        "model is None": {"model": None},
        "model is a number": {"model": 3},
        "features is nan": {"features": float("nan")},
        "features is a file": {"features": place / "C.png"},
        "features is unknown": {"features": "X_none"},
        "device is unknown": {"device": "tpu"},
        "dtype is unknown": {"dtype": "int8"},
        "key_added has a slash": {"key_added": "a/b"},
        "key_added is a star": {"key_added": "*"},
        "key_added is empty": {"key_added": ""},
        "layer has a slash": {"layer": "a/b"},
    }


def _option(what: str) -> Odd:
    def make(place: Path) -> Case:
        (place / "link.csv").symlink_to("A.zarr")
        kept = [place / "A.zarr", place / "C.png", place / "notes.csv"]
        return Case([place / "A.zarr"], _options(place)[what], DONE if harmless else None, kept)

    # Nothing is lost with an empty file, as `tempfile` or `touch` makes it.
    harmless = what == "summary is an empty file"
    return _odd(f"cohort.predict / {what}", make, harmless=harmless)


# --- Records of finished slides --------------------------------------------------------------------------------------

AGAIN, SKIPPED = {**DONE, "status": ["predicted"]}, {**DONE, "status": ["skipped"]}
TABLE = "tables/table"


def _json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def apply(store: Path) -> None:
        content = json.loads((store / name).read_text())
        change(content)
        (store / name).write_text(json.dumps(content))

    return apply


def _cut(name: str, share: float = 0.5) -> Callable[[Path], Any]:
    def apply(store: Path) -> None:
        path = store / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return apply


def _gone(name: str) -> Callable[[Path], Any]:
    def apply(store: Path) -> None:
        shutil.rmtree(store / name) if (store / name).is_dir() else (store / name).unlink()

    return apply


def _put(name: str, value: Any) -> Callable[[Path], Any]:
    """Write another value to a part of the table."""

    def apply(store: Path) -> None:
        import zarr
        from anndata.io import write_elem

        group = zarr.open_group(store / TABLE, mode="r+", use_consolidated=False)
        if name in group:
            del group[name]
        if value is not None:
            parent, _, key = name.rpartition("/")
            write_elem(group[parent] if parent else group, key, value)

    return apply


def _pixels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    """Write other pixels to the same array, with unchanged metadata."""

    def apply(store: Path) -> None:
        import zarr

        group = zarr.open_group(store / "images/he", mode="r+", use_consolidated=False)
        for array in dict(group.arrays()).values():
            array[...] = change(np.asarray(array[...]))

    return apply


def _other_image(store: Path) -> None:
    import spatialdata as sd

    sdata = sd.read_zarr(store)
    image = hg.datasets.toy((2, 3), mpp=MPP, seed=5)["he"]
    del sdata.images["he"]
    sdata.delete_element_from_disk("he")
    sdata["he"] = image
    sdata.write_element("he")


def _older_image(store: Path) -> None:
    """Replace the image by another one, whose files are older than the prediction."""
    other = _copy(_made()) / "B.zarr" / "images" / "he"
    for path in other.rglob("*"):
        os.utime(path, (1e9, 1e9))
    shutil.rmtree(store / "images/he")
    shutil.move(other, store / "images/he")


def _moved_spots(store: Path) -> None:
    import geopandas

    path = store / "shapes/spots/shapes.parquet"
    frame = geopandas.read_parquet(path)
    frame["geometry"] = frame.geometry.translate(3, 3)
    frame.to_parquet(path)


#: Changes of a predicted store after which it has to be predicted again.
REPEATED: dict[str, Callable[[Path], Any]] = {
    "the pixels are others": _pixels(lambda a: 255 - a),
    "a few pixels are others": _pixels(lambda a: np.where(np.arange(a.size).reshape(a.shape) < 50, 0, a)),
    "the image is written again": _other_image,
    "an older image lies at its place": _older_image,
    "the spots are moved": _moved_spots,
    "the image has another transformation": _json("images/he/zarr.json", lambda c: c["attributes"].update(odd=1)),
    "the record is gone": _gone(f"{TABLE}/uns/he2gene"),
    "the record has another hash": _put("uns/he2gene/weights_sha256", "0" * 64),
    "the hash is a number": _put("uns/he2gene/weights_sha256", 3),
    "the record has another scale of pixels": _put("uns/he2gene/mpp", 3.0),
    "the record is of genes": _put("uns/he2gene/genes", ["ERBB2"]),
    "the record has given µm/px to leave out": _put("uns/he2gene/given", ["mpp", "image_key"]),
    "the layer is gone": _gone(f"{TABLE}/layers/he2gene"),
    "the embedding is gone": _gone(f"{TABLE}/obsm/X_he2gene"),
    "the probabilities are gone": _gone(f"{TABLE}/obsm/he2gene_annotation_proba"),
}

#: Damage that the reader of the store has to name.
NAMED: dict[str, Callable[[Path], Any]] = {
    "the annotation is gone": _gone(f"{TABLE}/obs/he2gene_annotation"),
    "the share of tissue is gone": _gone(f"{TABLE}/obs/he2gene_tissue"),
    "the flags of genes are gone": _gone(f"{TABLE}/var/he2gene_reliable"),
    "the record lacks the hash": _gone(f"{TABLE}/uns/he2gene/weights_sha256"),
    "the store is gone": lambda store: shutil.rmtree(store),
    "the store is an empty folder": lambda store: (shutil.rmtree(store), store.mkdir()),
    "the store is a file": lambda store: (shutil.rmtree(store), store.write_text("x")),
    "zarr.json is cut": _cut("zarr.json"),
    "zarr.json is empty": _cut("zarr.json", 0),
    "zarr.json is gone": _gone("zarr.json"),
    "zarr.json is a list": lambda store: (store / "zarr.json").write_text("[]"),
    "the record is cut": _cut(f"{TABLE}/uns/he2gene/zarr.json"),
    "the record is empty": _cut(f"{TABLE}/uns/he2gene/zarr.json", 0),
    "a part of the record is cut": _cut(f"{TABLE}/uns/he2gene/mpp/zarr.json"),
    "the layer is cut": _cut(f"{TABLE}/layers/he2gene/zarr.json"),
    "the values of the layer are cut": _cut(f"{TABLE}/layers/he2gene/c/0/0"),
    "the values of the layer are empty": _cut(f"{TABLE}/layers/he2gene/c/0/0", 0),
    "the image is gone": _gone("images/he"),
    "the images are gone": _gone("images"),
    "the spots are gone": _gone("shapes/spots"),
    "the spots are cut": _cut("shapes/spots/shapes.parquet"),
    "the table is gone": _gone(TABLE),
    "obs is gone": _gone(f"{TABLE}/obs"),
    "the names of genes are cut": _cut(f"{TABLE}/var/_index/zarr.json"),
}

#: Parts of a record that may be missing or of another type.
FACTS = (
    "mpp",
    "n_spots",
    "layer",
    "tta",
    "shapes",
    "image",
    "share_on_tissue",
    "verdict",
    "share_out_of_distribution",
)
ODD_FACTS: dict[str, Any] = {"a text": "odd", "a list": ["a", "b"], "NaN": float("nan"), "gone": None}


def _touched(store: Path) -> None:
    for path in store.rglob("*"):
        os.utime(path)


def _added(store: Path) -> None:
    import spatialdata as sd

    sdata = sd.read_zarr(store)
    sdata["table"].obs["mine"] = 1
    hg.io.save(sdata)


#: Changes after which a store still counts as finished.
SAME: dict[str, Callable[[Path], Any]] = {
    "nothing is changed": lambda store: None,
    "a column is added": _added,
    "a file lies in the store": lambda store: (store / "notes.txt").write_text("mine"),
    "a file lies beside the tables": lambda store: (store / "tables/.DS_Store").write_bytes(b"x"),
    "a folder lies beside the tables": lambda store: (store / "tables/mine").mkdir(),
}


def _record(what: str, change: Callable[[Path], Any], expected: Any, **options: Any) -> Odd:
    def make(place: Path) -> Case:
        store = place / "A.zarr"
        change(store)
        given = {"mpp": MPP, **options}
        return Case([store], given, expected, [place / "C.png"] if expected else [place])

    return _odd(f"cohort record / {what}", make, _finished, expected is not None)


def _fact(fact: str, what: str) -> Odd:
    """Change a part of a record: the slide is predicted again, raises, or is skipped with the recorded summary."""

    def make(place: Path) -> Case:
        store = place / "A.zarr"
        _put(f"uns/he2gene/{fact}", ODD_FACTS[what])(store)
        return Case([store], {"mpp": MPP}, AGAIN, [place / "C.png"], any_status=True)

    return _odd(f"cohort record / {fact} is {what}", make, _finished)


def _of_image(what: str, change: Callable[[Path], Any], expected: Any, **options: Any) -> Odd:
    """Change the record of a store that was made from an image."""

    def make(place: Path) -> Case:
        # The record holds the full path, so predict the slide here.
        shutil.rmtree(place / "C.zarr")
        _told(_predict([place / "C.png"], mpp=MPP))
        spots = {"spots": list(_predict([place / "C.png"], mpp=MPP)["spots"])}
        change(place)
        given = None if expected is None else {**expected, **spots}
        return Case([place / "C.png"], {"mpp": MPP, **options}, given, [place / "C.zarr"] if expected is None else [])

    return _odd(f"cohort record / of an image, {what}", make, _finished, expected is not None)


def _repaint(place: Path) -> None:
    pixels = 255 - np.asarray(Image.open(place / "C.png"))
    Image.fromarray(pixels).save(place / "C.png")


OF_IMAGES: dict[str, tuple[Callable[[Path], Any], Any, dict[str, Any]]] = {
    "nothing is changed": (lambda place: None, SKIPPED, {}),
    "another pitch": (lambda place: None, None, {"pitch_um": 77.0}),
    "another method": (lambda place: None, None, {"tissue_method": "otsu"}),
    "the image is another": (_repaint, None, {}),
    "the image is touched": (lambda place: os.utime(place / "C.png"), None, {}),
    "the image is gone": (lambda place: (place / "C.png").unlink(), None, {}),
    "the image is a folder": (lambda place: ((place / "C.png").unlink(), (place / "C.png").mkdir()), None, {}),
    "the store is gone": (lambda place: shutil.rmtree(place / "C.zarr"), AGAIN, {}),
    "the store is of no record": (
        lambda place: _json("zarr.json", lambda c: c["attributes"]["he2gene"].pop("source"))(place / "C.zarr"),
        None,
        {},
    ),
    "the record is text": (
        lambda place: _json("zarr.json", lambda c: c["attributes"]["he2gene"].update(source="x"))(place / "C.zarr"),
        None,
        {},
    ),
    "the attributes are a list": (
        lambda place: _json("zarr.json", lambda c: c["attributes"].update(he2gene=[1]))(place / "C.zarr"),
        None,
        {},
    ),
    "the record is of another slide": (
        lambda place: _json("zarr.json", lambda c: c["attributes"]["he2gene"]["source"].update(path="/x"))(
            place / "C.zarr"
        ),
        None,
        {},
    ),
    "the layer is gone": (lambda place: _gone(f"{TABLE}/layers/he2gene")(place / "C.zarr"), None, {}),
    "the store is cut": (lambda place: _cut("zarr.json")(place / "C.zarr"), None, {}),
}


def odd_inputs() -> Iterator[Odd]:
    """Yield manifests, options and records of cohorts."""
    for what, content in READ.items():
        yield _odd(f"manifest / {what}", _manifest("m.csv", content, DONE), harmless=True)
    yield _odd("manifest / with tabs", _manifest("m.tsv", "path\tmpp\nA.zarr\t4\n", DONE), harmless=True)
    yield _odd("manifest / M.CSV", _manifest("M.CSV", "path,mpp\nA.zarr,4\n", DONE), harmless=True)
    for what, content in REFUSED.items():
        yield _odd(f"manifest / {what}", _manifest("m.csv", content, None))
    yield _odd("manifest / with commas, called tsv", _manifest("m.tsv", "path,mpp\nA.zarr,4\n", None))
    yield _odd("manifest / with tabs, called csv", _manifest("m.csv", "path\tmpp\nA.zarr\t4\n", None))
    for name in ENDINGS:
        yield _odd(f"manifest / called {name}", _manifest(name, "path,mpp\nA.zarr,4\n", None))
    for what in _frames(Path()):
        yield _frame(what)
    for what in _options(Path(mkdtemp(prefix="he2gene-odd-"))):
        yield _option(what)
    for what, change in REPEATED.items():
        yield _record(what, change, AGAIN)
    for what, change in NAMED.items():
        yield _record(what, change, None)
    for what, change in SAME.items():
        yield _record(what, change, SKIPPED)
    for fact in FACTS:
        for what in ODD_FACTS:
            yield _fact(fact, what)
    for what, (change, expected, options) in OF_IMAGES.items():
        yield _of_image(what, change, expected, **options)
