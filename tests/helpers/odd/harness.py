"""Definition of odd inputs, and functions that run them and classify the outcome."""

import hashlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

PACKAGE = str(Path(__import__("he2gene_sc").__file__).parent)

#: Outcomes of an input: correct ones and failures.
GOOD = ("right", "stated", "refused")
BAD = ("wrong in silence", "data lost", "raw error", "late error", "refused needlessly")

#: Number of images that the encoder of the tests has encoded.
WORK = {"images": 0}


@dataclass(frozen=True)
class Odd:
    """An odd input.

    Attributes
    ----------
    name
        ``"verb / what is odd"``.
    make
        Returns a call, the objects that must not change if it raises, and ``clean``, the expected result of a call
        without warnings (``None``: it has to warn or raise).
    harmless
        Whether the call has to give a correct result.
    """

    name: str
    make: Callable[[], tuple[Callable[[], Any], list[Any], Any]]
    harmless: bool = False


def outcome(odd: Odd) -> tuple[str, str]:
    """Run an odd input; return the outcome, one of GOOD and BAD, and the message."""
    with warnings.catch_warnings(action="ignore"):
        call, objects, clean = odd.make()
    before = [fingerprint(each) for each in objects]
    WORK["images"] = 0
    try:
        # Run in a temporary folder: a relative path among the odd values may create files.
        with TemporaryDirectory() as place, chdir(place), warnings.catch_warnings(record=True) as caught, _log() as log:
            warnings.simplefilter("always")
            given = call()
    except Exception as error:  # noqa: BLE001 - which kind it is, is what is judged
        return _refusal(odd, error, [fingerprint(each) for each in objects] == before)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and _ours(w)] + log
    if clean is not None and same(given, clean):
        return "right", ""
    if messages and not odd.harmless:
        return "stated", messages[0]
    return "wrong in silence", f"gave {_short(given)}"


@contextmanager
def _log() -> Iterator[list[str]]:
    """Collect logged warnings, which a notebook shows like warnings."""
    words: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.append(record.getMessage())

    handler, logger = Kept(logging.WARNING), logging.getLogger("he2gene_sc")
    logger.addHandler(handler)
    try:
        yield words
    finally:
        logger.removeHandler(handler)


def _refusal(odd: Odd, error: Exception, unchanged: bool) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    kinds = (ValueError, TypeError, OSError, ImportError, MemoryError)
    # typer names options that it cannot read in this attribute of its error.
    named = hasattr(error, "format_message") or (isinstance(error, kinds) and last.startswith(PACKAGE))
    if not unchanged:
        return "data lost", text
    if not named:
        return "raw error", text
    if WORK["images"] > 40:
        return "late error", text
    return ("refused needlessly" if odd.harmless else "refused"), text


def _ours(warning: warnings.WarningMessage) -> bool:
    # `stacklevel` has to point at the caller: at a test, not into a library.
    return "site-packages" not in warning.filename or "he2gene_sc" in warning.filename


def _short(given: Any) -> str:
    return " ".join(repr(given).split())[:160]


def fingerprint(thing: Any) -> Any:
    """Return the content of an object or folder as one value."""
    if isinstance(thing, Path):
        files = sorted(path for path in thing.rglob("*") if path.is_file()) if thing.is_dir() else [thing]
        return [(str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files if path.exists()]
    if hasattr(thing, "tables"):
        elements = sorted((name, id(element)) for kind, name, element in thing.gen_elements() if kind != "tables")
        return elements, {name: fingerprint(table) for name, table in thing.tables.items()}, repr(thing.attrs)
    slots = {name: {key: _digest(value) for key, value in getattr(thing, name).items()} for name in ("layers", "obsm")}
    frames = [_digest(getattr(thing, name)) for name in ("obs", "var")]
    return frames, slots, {key: _digest(value) for key, value in thing.uns.items()}, _digest(thing.X)


def _digest(value: Any) -> str:
    if scipy.sparse.issparse(value):
        value = value.toarray()
    if isinstance(value, pd.DataFrame | pd.Series):
        value = value.to_dict()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return repr(value)


def same(given: Any, clean: Any) -> bool:
    """Whether two results are equal."""
    if isinstance(clean, dict):
        return isinstance(given, dict) and given.keys() == clean.keys() and all(same(given[k], clean[k]) for k in clean)
    if isinstance(clean, pd.DataFrame):
        return (
            isinstance(given, pd.DataFrame)
            and list(given.columns) == list(clean.columns)
            and all(same(given[name].to_numpy(), clean[name].to_numpy()) for name in clean)
        )
    if isinstance(clean, np.ndarray) and clean.dtype.kind in "fiub":
        given = np.asarray(given)
        return (
            given.shape == clean.shape
            and given.dtype.kind in "fiub"
            and np.allclose(given, clean, rtol=1e-3, atol=1e-4, equal_nan=True)
        )
    if isinstance(clean, np.ndarray | list | tuple):
        return [str(v) for v in given] == [str(v) for v in clean] if np.ndim(given) else False
    return bool(given == clean)


@cache
def tiny():
    """Make network and specification of an encoder that counts its images, and a model of it trained on toy slides."""
    import torch

    import he2gene_sc as hg

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.inner = torch.nn.Conv2d(3, 8, 5, stride=4)

        def forward(self, images):
            WORK["images"] += len(images)
            return torch.relu(self.inner(images)).mean((2, 3))

    encoder = Counting().eval(), hg.models.EncoderSpec("tiny-odd", input_px=32)
    with warnings.catch_warnings(action="ignore"):
        sections = [labelled(seed) for seed in range(2)]
        model = hg.tl.train(sections, annotation_key="annotation", encoder=encoder, show_progress_bar=False)
    return encoder, model


def labelled(seed: int = 0, shape: tuple[int, int] = (5, 6)):
    """Make a toy slide of a new patient."""
    import he2gene_sc as hg

    sdata = hg.datasets.toy(shape, mpp=2.0, seed=seed)
    sdata["table"].obs["patient"] = f"P{seed}"
    sdata["table"].obs["section"] = f"S{seed}"
    return sdata


@cache
def _predicted():
    import he2gene_sc as hg

    sdata = labelled(0)
    hg.tl.predict(sdata, model=tiny()[1], show_progress_bar=False)
    return sdata


def copied(sdata):
    """Return an object of the same elements with copies of the tables."""
    import spatialdata as sd

    elements = {name: element for _, name, element in sdata.gen_spatial_elements()}
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return sd.SpatialData.init_from_elements({**elements, **tables}, attrs=dict(sdata.attrs))


def predicted():
    """Return a toy slide with a prediction."""
    return copied(_predicted())
