"""Odd commands: what a shell may be asked for."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import tifffile

from tests.odd.harness import Odd, predicted

WORDS = ("", " ", "nope", "-1", "0", "nan", "inf", "a/b", "1e400", "ä")


def _place() -> Path:
    return Path(mkdtemp(prefix="he2gene-odd-"))


def _run(*words: object) -> str:
    from he2gene_sc.cli.app import app

    return app([str(word) for word in words], standalone_mode=False)


@cache
def _written() -> Path:
    path = _place() / "slide.zarr"
    predicted().write(path)
    return path


def _store(place: Path) -> Path:
    return Path(shutil.copytree(_written(), place / "slide.zarr"))


def _picture(place: Path) -> Path:
    rng = np.random.default_rng(0)
    tifffile.imwrite(place / "slide.tif", rng.integers(150, 250, (200, 300, 3), dtype=np.uint8), photometric="rgb")
    return place / "slide.tif"


def _damaged(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        store = _store(place)
        change(store)
        return store

    return make


def _cut(pattern: str) -> Callable[[Path], Any]:
    def change(store: Path) -> None:
        for path in sorted(store.glob(pattern)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def _removed(pattern: str) -> Callable[[Path], Any]:
    def change(store: Path) -> None:
        for path in sorted(store.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


STORES = {
    "an empty folder": lambda place: place,
    "a file": lambda place: _write(place / "a.zarr", "x"),
    "nothing": lambda place: place / "nothing.zarr",
    "a folder of pictures": lambda place: _picture(place).parent,
    "a store whose zarr.json is cut": _damaged(_cut("zarr.json")),
    "a store without zarr.json": _damaged(_removed("zarr.json")),
    "a store without images": _damaged(_removed("images")),
    "a store without shapes": _damaged(_removed("shapes")),
    "a store without tables": _damaged(_removed("tables")),
    "a store whose image lacks its metadata": _damaged(_removed("images/he/zarr.json")),
    "a store whose table lacks its metadata": _damaged(_removed("tables/table/zarr.json")),
    "a store whose table lacks obs": _damaged(_removed("tables/table/obs")),
    "a store whose table lacks X": _damaged(_removed("tables/table/X")),
    "a store whose spots are cut": _damaged(_cut("shapes/spots/*.parquet")),
    "a store whose obs is cut": _damaged(_cut("tables/table/obs/*/zarr.json")),
    "a store whose layer is cut": _damaged(_cut("tables/table/layers/he2gene/c/*/*")),
}


MANIFESTS = {
    "empty": "",
    "without rows": "path\n",
    "without a column path": "slide\nslide.tif\n",
    "with a column that is no argument": "path,colour\nslide.tif,red\n",
    "with two columns of one name": "path,mpp,mpp\nslide.tif,1,2\n",
    "with a cell too many": "path,mpp\nslide.tif,1\nslide.tif,1,2\n",
    "with a slide twice": "path,mpp\nslide.tif,1\nslide.tif,1\n",
    "with an empty path": "path,mpp\n,1\n",
    "with µm/px in words": "path,mpp\nslide.tif,half\n",
    "with µm/px below 0": "path,mpp\nslide.tif,-1\n",
    "with endless µm/px": "path,mpp\nslide.tif,inf\n",
    "with no spot a batch": "path,batch_size\nslide.tif,0\n",
    "with half a spot a batch": "path,batch_size\nslide.tif,0.5\n",
    "with a device that is not here": "path,device\nslide.tif,cuda:9\n",
    "with a model that is not here": "path,model\nslide.tif,nowhere\n",
    "with an endless pitch": "path,pitch_um\nslide.tif,inf\n",
    "with a method that is not known": "path,tissue_method\nslide.tif,magic\n",
    "with maybe for a flag": "path,exact\nslide.tif,maybe\n",
    "with semicolons": "path;mpp\nslide.tif;1\n",
    "that ends in a quote": 'path\n"slide.tif\n',
    "of zeros": "\0" * 64,
}


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _command(what: str, words: Callable[[Path], list[object]]) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        place = _place()
        given = words(place)
        return lambda: _run(*given), [place], None

    return Odd(f"$ he2gene {what}", make)


def odd_inputs() -> Iterator[Odd]:
    """Commands times stores and words."""
    for what, store in STORES.items():
        for command in ("predict", "evaluate"):
            yield _command(f"{command} {what}", lambda place, c=command, s=store: [c, s(place)])
        yield _command(f"info {what}", lambda place, s=store: ["info", s(place)])
    for word in WORDS:
        for option in ("--mpp", "--model", "--image-key", "--shapes-key", "--table-key", "--device", "--pitch-um"):
            if (option, word) in {("--pitch-um", "0")}:
                continue
            yield _command(
                f"predict slide.tif {option} {word!r}", lambda p, o=option, w=word: ["predict", _picture(p), o, w]
            )
        for option in ("--genes", "--coordinate-system", "--batch-size", "--key-added"):
            # Most words are good names of what is written.
            if option != "--key-added" or word in ("", " ", "a/b"):
                yield _command(f"predict {option} {word!r}", lambda p, o=option, w=word: ["predict", _store(p), o, w])
        yield _command(
            f"predict slide.tif --tissue-method {word!r}",
            lambda p, w=word: ["predict", _picture(p), "--mpp", 1, "--tissue-method", w],
        )
        for option in ("--layer", "--prediction-key", "--genes", "--measured", "--measured-scale", "--annotation-key"):
            yield _command(f"evaluate {option} {word!r}", lambda p, o=option, w=word: ["evaluate", _store(p), o, w])
        yield _command(f"info {word!r}", lambda p, w=word: ["info", w])
        yield _command(f"demo --section {word!r}", lambda p, w=word: ["demo", "--section", w, "--out", p / "out"])
        yield _command(
            f"train with seed {word!r}",
            lambda p, w=word: [
                "train",
                _write(p / "t.toml", f'sections = ["C2"]\n[train]\nseed = "{w}"\n'),
                "--out",
                p / "m",
            ],
        )
    for what, text in MANIFESTS.items():
        yield _command(
            f"predict a manifest {what}",
            lambda p, t=text: [
                "predict",
                "--manifest",
                _write(_picture(p).with_name("m.csv"), t),
                "--out-dir",
                p / "out",
            ],
        )
