"""Odd files: images, counts and spot files that are damaged or of another format."""

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import tifffile
from PIL import Image

import he2gene_sc as hg
from tests.helpers.odd.harness import Odd

_RNG = np.random.default_rng(0)
#: Smooth image, which lossy codecs hardly change.
_Y, _X = np.mgrid[:96, :128]
PICTURE = np.stack([180 + 0.3 * _X, 120 + 0.4 * _Y, 170 + 0.2 * (_X + _Y)], axis=-1).clip(0, 255).astype(np.uint8)


def _place() -> Path:
    return Path(mkdtemp(prefix="he2gene-odd-"))


def _saved(name: str, mode: str | None = None, **options: Any) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        image = Image.fromarray(PICTURE)
        (image if mode is None else image.convert(mode)).save(place / name, **options)
        return place / name

    return make


def _tiff(array: np.ndarray, **options: Any) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        tifffile.imwrite(place / "a.tif", array, **options)
        return place / "a.tif"

    return make


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def _encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, kind, **options)
    return stream.getvalue()


def _tiled() -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, PICTURE, photometric="rgb", tile=(32, 32), compression="zlib")
    return stream.getvalue()


def _of(value: int, shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.full(shape, value, dtype)


#: Images that have to be read, with their pixels (``None``: PICTURE).
READ = {
    "rgb png": _saved("a.png"),
    "rgb png in capital letters": _saved("A.PNG"),
    "rgb jpeg": _saved("a.jpg", quality=100, subsampling=0),
    "progressive jpeg": _saved("a.jpeg", quality=100, subsampling=0, progressive=True),
    "strips": _tiff(PICTURE, photometric="rgb"),
    "planes": _tiff(np.moveaxis(PICTURE, -1, 0), photometric="rgb", planarconfig="separate"),
    "tiles": _tiff(PICTURE, photometric="rgb", tile=(32, 32)),
    "tiles, deflate": _tiff(PICTURE, photometric="rgb", tile=(32, 32), compression="zlib"),
    "tiles, zstd": _tiff(PICTURE, photometric="rgb", tile=(32, 32), compression="zstd"),
    "tiles, lzw, predictor": _tiff(PICTURE, photometric="rgb", tile=(32, 32), compression="lzw", predictor=True),
    "big tiff": _tiff(PICTURE, photometric="rgb", bigtiff=True),
    "big endian": _tiff(PICTURE, photometric="rgb", byteorder=">"),
    "rgba, opaque": _tiff(np.dstack([PICTURE, _of(255, (96, 128))]), photometric="rgb", extrasamples=["unassalpha"]),
    "rgba png, opaque": _saved("a.png", "RGBA"),
}


def _pages(*pages: tuple[np.ndarray, dict[str, Any]], ome: bool = False) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place / ("a.ome.tif" if ome else "a.tif")
        with tifffile.TiffWriter(path, ome=ome) as file:
            for array, options in pages:
                file.write(array, photometric="rgb", **options)
        return path

    return make


def _damaged_tile(index: int, content: bytes) -> Callable[[Path], Path]:
    """Make a tiled image with other bytes in one tile."""

    def make(place: Path) -> Path:
        path = _tiff(PICTURE, photometric="rgb", tile=(32, 32), compression="zlib")(place)
        with tifffile.TiffFile(path) as file:
            offset, size = file.pages[0].dataoffsets[index], file.pages[0].databytecounts[index]
        with path.open("r+b") as stream:
            stream.seek(offset)
            stream.write((content * size)[:size])
        return path

    return make


_TILES = {"tile": (32, 32), "compression": "zlib"}
#: Files from public bug reports that have to be read.
READ |= {
    "a pyramid of sides that were rounded": _pages(
        (PICTURE, {**_TILES, "subifds": 2}),
        (PICTURE[1::3, 1::3][:31, :43], {**_TILES, "subfiletype": 1}),
        (PICTURE[4::9, 4::9][:11, :15], {**_TILES, "subfiletype": 1}),
    ),
    "a pyramid of pages without the flag": _pages(
        (PICTURE, _TILES), (PICTURE[::2, ::2], _TILES), (PICTURE[::4, ::4], _TILES)
    ),
    "tiles that are larger than the image": _tiff(PICTURE, photometric="rgb", tile=(256, 256)),
    "jpeg tiles, 4:2:0": _tiff(
        PICTURE, photometric="rgb", tile=(32, 32), compression="jpeg", compressionargs={"level": 98}, subsampling=(2, 2)
    ),
    "jpeg tiles, 4:2:2": _tiff(
        PICTURE, photometric="rgb", tile=(32, 32), compression="jpeg", compressionargs={"level": 98}, subsampling=(2, 1)
    ),
    "jpeg tiles, 4:4:4": _tiff(
        PICTURE, photometric="rgb", tile=(32, 32), compression="jpeg", compressionargs={"level": 98}, subsampling=(1, 1)
    ),
    "strips, lzw, predictor": _tiff(PICTURE, photometric="rgb", compression="lzw", predictor=True),
    "strips, deflate, predictor": _tiff(PICTURE, photometric="rgb", compression="zlib", predictor=True),
    "strips, packbits": _tiff(PICTURE, photometric="rgb", compression="packbits"),
    "strips of seven rows": _tiff(PICTURE, photometric="rgb", rowsperstrip=7),
    "big endian tiles with a predictor": _tiff(PICTURE, photometric="rgb", byteorder=">", predictor=True, **_TILES),
    "big tiff with a pyramid": _tiff(PICTURE, photometric="rgb", bigtiff=True, tile=(32, 32)),
    "planes in tiles": _tiff(np.moveaxis(PICTURE, -1, 0), photometric="rgb", planarconfig="separate", **_TILES),
    "jpeg 2000 tiles": _tiff(PICTURE, photometric="rgb", tile=(32, 32), compression="jpeg2000"),
    "ome, a thumbnail first": _pages((PICTURE[::4, ::4], {}), (PICTURE, _TILES), ome=True),
    "ome, a thumbnail last": _pages((PICTURE, _TILES), (PICTURE[::4, ::4], {}), ome=True),
    "called svs": lambda place: _tiff(PICTURE, photometric="rgb", **_TILES)(place).rename(place / "a.svs"),
    "a tiff called jpg": lambda place: _tiff(PICTURE, photometric="rgb")(place).rename(place / "a.jpg"),
    "a name with blanks and umlauts": lambda place: _saved("a.png")(place).rename(place / "ä b [1] %20.png"),
}

#: Images that have to be refused.
REFUSED = {
    "the last tile damaged": _damaged_tile(-1, b"\xff"),
    "the last tile zeros": _damaged_tile(-1, b"\0"),
    "the first tile of another tile": _damaged_tile(0, b"\x78\x9c"),
    "two pages of one size, another stain": _pages((PICTURE, {}), (255 - PICTURE, {}), ome=False),
    "nothing": lambda place: place / "a.tif",
    "a folder": lambda place: place,
    "an empty file": _bytes("a.tif", b""),
    "text called tif": _bytes("a.tif", b"this is text" * 50),
    "text called png": _bytes("a.png", b"this is text" * 50),
    "text called jpg": _bytes("a.jpg", b"this is text" * 50),
    "text called svs": _bytes("a.svs", b"this is text" * 50),
    "text called ndpi": _bytes("a.ndpi", b"this is text" * 50),
    "an unknown ending": _bytes("a.xyz", _encoded("PNG")),
    "zeros": _bytes("a.tif", bytes(5000)),
    "a header alone": _bytes("a.tif", b"II*\0\x08\0\0\0"),
    "grey png": _saved("a.png", "L"),
    "grey and alpha png": _saved("a.png", "LA"),
    "one bit png": _saved("a.png", "1"),
    "grey tiff": _tiff(PICTURE[..., 0]),
    "grey tiff, 16 bits": _tiff(PICTURE[..., 0].astype(np.uint16)),
    # Of 12 bits or of 16: the error says how to make 8 of them.
    "16 bits a channel": _tiff(PICTURE.astype(np.uint16) * 257, photometric="rgb"),
    "two channels": _tiff(PICTURE[..., :2], photometric="minisblack", planarconfig="contig"),
    "five channels": _tiff(_RNG.integers(0, 255, (5, 96, 128), dtype=np.uint8), photometric="minisblack"),
    "a stack": _tiff(_RNG.integers(0, 255, (7, 96, 128), dtype=np.uint8), photometric="minisblack"),
    "signed": _tiff(PICTURE.astype(np.int16), photometric="rgb"),
    "complex": _tiff(PICTURE[..., 0].astype(np.complex64)),
    "float with NaN": _tiff(np.where(PICTURE > 200, np.nan, PICTURE / 255).astype(np.float32), photometric="rgb"),
    "float beyond 255": _tiff((PICTURE * 100.0).astype(np.float32), photometric="rgb"),
    "float below 0": _tiff((PICTURE / 255 - 0.9).astype(np.float32), photometric="rgb"),
}


def _resolution(x: Any, y: Any, unit: int) -> Callable[[Path], Path]:
    return _tiff(PICTURE, photometric="rgb", resolution=(x, y), resolutionunit=unit)


def _described(text: str) -> Callable[[Path], Path]:
    return _tiff(PICTURE, photometric="rgb", description=text, metadata=None)


def _ome(**facts: Any) -> Callable[[Path], Path]:
    return lambda place: _pages((PICTURE, {"metadata": {"axes": "YXS", **facts}}), ome=True)(place)


#: µm per pixel that files state (``None``: not usable, with a warning).
STATED: dict[str, tuple[Callable[[Path], Path], float | None]] = {
    "20,000 pixels a cm": (_resolution(20000, 20000, 3), 0.5),
    "40,000 pixels a cm": (_resolution(40000, 40000, 3), 0.25),
    "50,800 pixels an inch": (_resolution(50800, 50800, 2), None),
    "72 pixels an inch": (_resolution(72, 72, 2), None),
    "20,000 pixels of no unit": (_resolution(20000, 20000, 1), None),
    "1 pixel a cm": (_resolution(1, 1, 3), None),
    "0 pixels a cm": (_resolution((0, 1), (0, 1), 3), None),
    "pixels that are not square": (_resolution(20000, 10000, 3), None),
    "MPP of Aperio": (_described("Aperio Image Library v12\r\n1x1|AppMag = 20|MPP = 0.5000"), 0.5),
    "MPP of Aperio without blanks": (_described("Aperio|AppMag=20|MPP=0.5"), 0.5),
    "no MPP of Aperio": (_described("Aperio Image Library v12\r\n1x1|AppMag = 20"), None),
    "MPP of Aperio with a comma": (_described("Aperio|AppMag = 20|MPP = 0,5"), None),
    "MPP of Aperio 0": (_described("Aperio|MPP = 0"), None),
    "MPP of Aperio nan": (_described("Aperio|MPP = nan"), None),
    "MPP of Aperio in nm": (_described("Aperio|MPP = 500"), None),
    "ome in µm": (_ome(PhysicalSizeX=0.5, PhysicalSizeY=0.5), 0.5),
    "ome in nm": (_ome(PhysicalSizeX=500, PhysicalSizeXUnit="nm", PhysicalSizeY=500, PhysicalSizeYUnit="nm"), 0.5),
    "ome in mm": (_ome(PhysicalSizeX=5e-4, PhysicalSizeXUnit="mm", PhysicalSizeY=5e-4, PhysicalSizeYUnit="mm"), 0.5),
    "ome in pixels": (
        _ome(PhysicalSizeX=1, PhysicalSizeXUnit="pixel", PhysicalSizeY=1, PhysicalSizeYUnit="pixel"),
        None,
    ),
    "ome in two units": (_ome(PhysicalSizeX=0.5, PhysicalSizeY=500, PhysicalSizeYUnit="nm"), 0.5),
    "ome of x alone": (_ome(PhysicalSizeX=0.5), 0.5),
    "ome of unknown unit": (_ome(PhysicalSizeX=0.5, PhysicalSizeXUnit="reference frame"), None),
    "ome 0": (_ome(PhysicalSizeX=0.0, PhysicalSizeY=0.0), None),
}


def _mpp(what: str, make: Callable[[Path], Path], expected: float | None) -> Odd:
    def ready() -> tuple[Callable[[], Any], list[Any], Any]:
        place = _place()
        path = make(place)

        def call() -> Any:
            found = hg.io.read_he(path).attrs.get("he2gene", {}).get("mpp", {}).get("he")
            return None if found is None else round(float(found), 6)

        return call, [place], expected

    return Odd(f"read_he / µm per pixel, {what}", ready, expected is not None)


MPPS: dict[str, Any] = {
    "zero": 0,
    "minus one": -1.0,
    "nan": float("nan"),
    "infinity": float("inf"),
    "text": "0.5",
    "list": [0.5],
    "true": True,
    "huge": 1e12,
}


def _pixels(sdata: Any) -> np.ndarray:
    image = sdata["he"]
    image = image["scale0"]["image"] if hasattr(image, "children") else image
    return np.moveaxis(np.asarray(image.data), 0, -1)[..., :3].astype(float)


def _near(pixels: np.ndarray) -> Any:
    # Lossy codecs and 16 bits may change a value slightly.
    return "as saved" if pixels.shape == PICTURE.shape and np.abs(pixels - PICTURE).mean() < 3 else pixels


def _picture(what: str, make: Callable[[Path], Path], harmless: bool) -> Odd:
    def ready() -> tuple[Callable[[], Any], list[Any], Any]:
        place = _place()
        path = make(place)
        return lambda: _near(_pixels(hg.io.read_he(path, mpp=0.5))), [place], "as saved"

    return Odd(f"read_he / {what}", ready, harmless)


def _truncated(name: str, content: bytes, share: float) -> Odd:
    return _picture(f"{name} cut at {share:.0%}", _bytes(name, content[: int(len(content) * share)]), False)


#: A small legacy ST section.
GENES = ["ERBB2", "CD24", "COL1A1"]
SPOTS = [f"{x}x{y}" for y in range(1, 4) for x in range(1, 5)]


def _counts() -> str:
    rows = [f"{spot}\t" + "\t".join(str((i * 7 + j) % 5 + 1) for j in range(3)) for i, spot in enumerate(SPOTS)]
    return "\n".join(["\t" + "\t".join(GENES), *rows]) + "\n"


def _positions() -> str:
    head = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"
    rows = []
    for spot in SPOTS:
        x, y = map(int, spot.split("x"))
        rows.append(f"{x}\t{y}\t{x}\t{y}\t{x * 40.0}\t{y * 40.0}\t1")
    return "\n".join([head, *rows]) + "\n"


def _labels() -> str:
    rows = [f"{spot}\t{spot.split('x')[0]}\t{spot.split('x')[1]}\tinvasive cancer" for spot in SPOTS]
    return "\n".join(["Row.names\tx\ty\tlabel", *rows]) + "\n"


CHANGES: dict[str, Callable[[str], str]] = {
    "is empty": lambda text: "",
    "is a header alone": lambda text: text.split("\n")[0] + "\n",
    "lacks the header": lambda text: text.split("\n", 1)[1],
    "has a short row": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\n",
    "has a long row": lambda text: text.rstrip("\n") + "\t5\n",
    "has a row twice": lambda text: text + text.rstrip("\n").rsplit("\n", 1)[1] + "\n",
    "has a text for a number": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\tmany\n",
    "is separated by commas": lambda text: text.replace("\t", ","),
    "is binary": lambda text: "\0\1\2" * 50,
    "has a column twice": lambda text: _twice(text),
    "has no rows that meet": lambda text: (
        text.replace("x1\t", "x91\t").replace("x2\t", "x92\t").replace("x3\t", "x93\t")
    ),
    "has NaN": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\tNaN\n",
    "has a negative number": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\t-3\n",
    "has infinity": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\tinf\n",
    "has a byte order mark": lambda text: "\ufeff" + text,
    "has line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "has line ends of old Macs": lambda text: text.replace("\n", "\r"),
    "has a tab at each end": lambda text: text.replace("\n", "\t\n"),
    "has quoted cells": lambda text: "\n".join(
        "\t".join(f'"{cell}"' for cell in line.split("\t")) for line in text.rstrip("\n").split("\n")
    ),
    "has blanks around cells": lambda text: text.replace("\t", " \t "),
    "has blanks before rows": lambda text: text.replace("\n", "\n "),
    "has empty lines": lambda text: text.replace("\n", "\n\n"),
    "has a remark first": lambda text: "# made by a pipeline\n" + text,
    "has decimal commas": lambda text: text.replace("\t1", "\t1,0"),
    "has whole numbers as fractions": lambda text: text.rstrip("\n") + ".0\n",
    "has a number with an underscore": lambda text: text.rstrip("\n") + "_0\n",
    "has a number beyond all bounds": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\t1e400\n",
    "has a row of zeros in its name": lambda text: text.replace("\n1x", "\n01x"),
    "has upper case names": lambda text: text.upper(),
    "has a fraction": lambda text: text.rstrip("\n").rsplit("\t", 1)[0] + "\t1.5\n",
}


def _twice(text: str) -> str:
    lines = text.rstrip("\n").split("\n")
    return "\n".join(line + "\t" + line.split("\t")[1] for line in lines) + "\n"


def _st_files(place: Path) -> dict[str, Path]:
    paths = {"counts": place / "A.tsv", "spots": place / "A_selection.tsv", "labels": place / "A_labels.tsv"}
    for name, text in {"counts": _counts(), "spots": _positions(), "labels": _labels()}.items():
        paths[name].write_text(text)
    return paths


def _st(what: str, change: Callable[[dict[str, Path], Path], dict[str, Any]]) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        place = _place()
        kwargs: dict[str, Any] = {**_st_files(place)}
        plain = _table(hg.io.read_st(**kwargs, mpp=0.7))
        kwargs |= change(kwargs, place)
        return lambda: _table(hg.io.read_st(**{"mpp": 0.7, **kwargs})), [place], plain

    return Odd(f"read_st / {what}", make)


def _table(sdata: Any) -> dict[str, Any]:
    table = sdata["table"]
    labels = table.obs["pathologist"].astype(str) if "pathologist" in table.obs else []
    return {"X": table.X.toarray(), "genes": list(table.var_names), "labels": np.asarray(labels)}


def _text(which: str, change: Callable[[str], str]) -> Callable[[dict[str, Path], Path], dict[str, Any]]:
    def apply(paths: dict[str, Path], _: Path) -> dict[str, Any]:
        paths[which].write_text(change(paths[which].read_text()))
        return {}

    return apply


def _bytes_of(which: str, encoding: str) -> Callable[[dict[str, Path], Path], dict[str, Any]]:
    def apply(paths: dict[str, Path], _: Path) -> dict[str, Any]:
        paths[which].write_bytes(paths[which].read_text().encode(encoding))
        return {}

    return apply


def _gzipped(cut: float) -> Callable[[dict[str, Path], Path], dict[str, Any]]:
    def apply(paths: dict[str, Path], place: Path) -> dict[str, Any]:
        content = gzip.compress(paths["counts"].read_bytes())
        (place / "A.tsv.gz").write_bytes(content[: int(len(content) * cut)])
        return {"counts": place / "A.tsv.gz"}

    return apply


def odd_inputs() -> Iterator[Odd]:
    """Yield images and ST files."""
    for what, make in READ.items():
        yield _picture(what, make, True)
    for what, make in REFUSED.items():
        yield _picture(what, make, False)
    for share in (0.02, 0.1, 0.3, 0.6, 0.9, 0.99):
        for name, content in {"a.png": _encoded("PNG"), "a.jpg": _encoded("JPEG"), "a.tif": _tiled()}.items():
            yield _truncated(name, content, share)
    for what, (make, expected) in STATED.items():
        yield _mpp(what, make, expected)
    for what, value in MPPS.items():
        yield Odd(
            f"read_he(mpp={what})",
            lambda v=value: (lambda: _pixels(hg.io.read_he(_saved("a.png")(_place()), mpp=v)), [], None),
        )
        yield _st(f"mpp is {what}", lambda paths, place, v=value: {"mpp": v})
        yield _st(f"pitch_um is {what}", lambda paths, place, v=value: {"pitch_um": v, "mpp": None})
        yield _st(f"diameter_um is {what}", lambda paths, place, v=value: {"diameter_um": v})
    for which in ("counts", "spots", "labels"):
        for what, change in CHANGES.items():
            yield _st(f"the file of {which} {what}", _text(which, change))
        for encoding in ("utf-16", "utf-32", "utf-16-le"):
            yield _st(f"the file of {which} is in {encoding}", _bytes_of(which, encoding))
        yield _st(f"the file of {which} is a folder", lambda paths, place, w=which: {w: place})
        yield _st(f"there is no file of {which}", lambda paths, place, w=which: {w: place / "none"})
    yield _st("selected is text", _text("spots", lambda text: text.replace("\t1\n", "\tTrue\n")))
    yield _st("selected is 0 everywhere", _text("spots", lambda text: text.replace("\t1\n", "\t0\n")))
    for cut in (0.0, 0.3, 0.9, 0.999):
        yield _st(f"gzip cut at {cut:.1%}", _gzipped(cut))
    yield _st("gzip whole", _gzipped(1.0))
