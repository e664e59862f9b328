"""Odd commands in a shell."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import tifffile

from tests.helpers.odd.harness import Odd, predicted

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


#: Options that no other list has, by command: the words before the option, with an output path.
OPTIONS: dict[str, tuple[Callable[[Path], list[object]], dict[str, tuple[str, ...]]]] = {
    "predict slide.tif": (
        lambda p: ["predict", _picture(p), "--mpp", 1],
        {
            "--manifest": WORDS,
            "--out": ("", " ", "/dev/null/x", "/proc/x.zarr", "x" * 5000),
            "--workers": ("", " ", "nope", "-1", "0", "nan", "inf", "1e400", "1.5", "two"),
            "--device": ("cuda:9", "cpu:x", "CPU", "cuda:", "meta"),
            "--mpp": ("0,5", "0.5 um", "1e-9", "1e9", "-0", "½"),
            "--pitch-um": ("1e9", "-0", "0,5"),
            "--batch-size": ("1.5", "1e3"),
        },
    ),
    "report": (
        lambda p: ["report", _store(p)],
        {
            "--out": ("", " ", "x.txt", "x.pdf", "/dev/null", "/proc/x.html", "none/x.html", "x" * 300 + ".html"),
            "--genes": ("", " ", ",", "nope", "ERBB2;CD24", "nan"),
            "--model": ("", " ", "nope", "a/b", "hf://", "hf://nope", "http://x"),
            "--prediction-key": WORDS,
            "--table-key": WORDS,
        },
    ),
    "evaluate": (
        lambda p: ["evaluate", _store(p)],
        {
            "--out": ("", " ", "/", "none/x.csv", "/proc/x.csv", "x" * 300 + ".csv"),
        },
    ),
    "benchmark": (
        lambda p: ["benchmark", "--out", p / "out", "--cache", p / "cache"],
        {
            "--data": WORDS,
            "--model": WORDS,
            "--folds": WORDS,
            "--section": WORDS,
            "--device": ("", "nope", "cuda:9", "nan"),
            "--options": ("", " ", "nope", "/"),
            "--cache": ("/dev/null", "/proc/x", "x" * 5000),
            "--out": ("/dev/null", "/proc/x", "x" * 5000),
        },
    ),
    "benchmark --data hbcis": (
        lambda p: ["benchmark", "--data", "hbcis", "--out", p / "out"],
        {"--root": (*WORDS, "/", "/dev/null")},
    ),
    "demo": (
        lambda p: ["demo", "--section", "C5"],
        {"--model": ("", " ", "nope", "a/b", "hf://"), "--out": ("/dev/null", "/proc/x", "x" * 5000)},
    ),
    "info": (lambda p: ["info"], {"hf": ("hf://", "hf://x", "hf://a/b@", "hf:///", "HF://a/b")}),
}

#: Training files.
TRAINING = {
    "empty": "",
    "of a byte order mark": "\ufeffsections = []\n",
    "that is JSON": '{"sections": ["C2"]}',
    "that is YAML": "sections:\n  - C2\n",
    "with no section": "sections = []\n[train]\n",
    "with a section that is not known": 'sections = ["Z9"]\n[train]\n',
    "with a section twice": 'sections = ["C2", "C2"]\n[train]\n',
    "with sections in a text": 'sections = "C2"\n[train]\n',
    "with sections and data": 'sections = ["C2"]\n[data]\nstores = ["A.zarr"]\n',
    "with no data": "[data]\n[train]\n",
    "with stores that are not there": '[data]\nstores = ["A.zarr"]\n[train]\n',
    "with a store in a text": '[data]\nstores = "slide.zarr"\n[train]\n',
    "with an empty store": '[data]\nstores = [""]\n[train]\n',
    "with no stores": "[data]\nstores = []\n[train]\n",
    "with a folder of HBCIS that is not there": '[data]\nhbcis = "none"\n[train]\n',
    "with a folder of HEST that is not there": '[data]\nhest = "none"\n[train]\n',
    "with two sources": '[data]\nhest = "a"\nhbcis = "b"\n[train]\n',
    "with ids beside stores": '[data]\nstores = ["slide.zarr"]\nids = ["x"]\n[train]\n',
    "with a part that is not known": '[data]\nhbcis = "."\npatients = "HE2GENE_SPLIT.none"\n[train]\n',
    "with an unknown table": 'sections = ["C2"]\n[tain]\nseed = 0\n',
    "with an unknown argument": 'sections = ["C2"]\n[train]\nseeds = 0\n',
    "with seed nan": 'sections = ["C2"]\n[train]\nseed = nan\n',
    "with seed true": 'sections = ["C2"]\n[train]\nseed = true\n',
    "with seed -1": 'sections = ["C2"]\n[train]\nseed = -1\n',
    "with a preset that is not known": 'sections = ["C2"]\n[train]\npreset = "fast"\n',
    "with a preset without a name": 'sections = ["C2"]\n[train.preset]\nmax_epochs = 2\n',
    "with an encoder that is not known": 'sections = ["C2"]\n[train]\nencoder = "nope"\n',
    "with windows of nan": 'sections = ["C2"]\n[train.preset]\nwindows_um = [nan]\n',
    "with windows of inf": 'sections = ["C2"]\n[train.preset]\nwindows_um = [50.0, inf]\n',
    "with windows below 0": 'sections = ["C2"]\n[train.preset]\nwindows_um = [-50.0]\n',
    "with no latent": 'sections = ["C2"]\n[train.preset]\nn_latent = 0\n',
    "with latent nan": 'sections = ["C2"]\n[train.preset]\nn_latent = nan\n',
    "with mpp nan": 'sections = ["C2"]\n[train.keys]\nmpp = nan\n',
    "with mpp in words": 'sections = ["C2"]\n[train.keys]\nmpp = "half"\n',
    "with a share of nan": 'sections = ["C2"]\n[train.genes]\nmin_spot_share = nan\n',
    "with a share of 2": 'sections = ["C2"]\n[train.genes]\nmin_spot_share = 2.0\n',
    "with genes in a text": 'sections = ["C2"]\n[train.genes]\ngenes = "ERBB2"\n',
    "with programmes that are not there": 'sections = ["C2"]\n[train.genes]\nprogrammes = "none.gmt"\n',
    "with a cache in OUT": 'sections = ["C2"]\n[train]\ncache = "m/cache"\n',
    "with a cache that is a number": 'sections = ["C2"]\n[train]\ncache = 3\n',
    "with a device that is not here": 'sections = ["C2"]\n[train]\ndevice = "cuda:9"\n',
    "with a date": 'sections = ["C2"]\n[train]\nseed = 2020-01-01\n',
    "with a key twice": 'sections = ["C2"]\nsections = ["C3"]\n',
    "with a NUL": 'sections = ["C2\\u0000"]\n',
    "cut in a text": 'sections = ["C2',
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
    """Yield all combinations of commands with stores and words."""
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
            # Most words are valid names for outputs.
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
    for command, (words, options) in OPTIONS.items():
        for option, values in options.items():
            for value in values:
                shown = value if len(value) < 30 else f"{value[0]} × {len(value)}"
                yield _command(
                    f"{command} {option} {shown!r}",
                    lambda p, w=words, o=option, v=value: [*w(p), *([o] if o.startswith("-") else []), v],
                )
    for what, text in TRAINING.items():
        yield _command(
            f"train {what}",
            lambda p, t=text: ["train", _write(_store(p).with_name("t.toml"), t), "--out", p / "m", "--json"],
        )
    for what in ("", " ", "/dev/null", "/proc/x", "x" * 5000):
        yield _command(
            f"train --out {what[:9]!r}",
            lambda p, w=what: ["train", _write(p / "t.toml", 'sections = ["C2"]\n[train]\n'), "--out", w],
        )
