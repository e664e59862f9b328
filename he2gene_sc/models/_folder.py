"""Model folders: written whole, and read with every file checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ._card import ModelCard
from ._gene_table import COLUMNS, FIGURES, read_genes
from ._tensors import check_tensors

_CARD, _GENES, _WEIGHTS, _README = "card.json", "genes.csv", "weights.safetensors", "README.md"
#: Tries of exchanging two folders where several processes write the same model.
_TRIES = 20
_FILES = (_CARD, _GENES, _WEIGHTS, _README)


def read(folder: Path) -> tuple[ModelCard, pd.DataFrame, dict[str, np.ndarray]]:
    """Read card, gene table and tensors, with every file checked."""
    missing = [name for name in (_CARD, _GENES, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`model` folder {folder.name!r} is incomplete: {missing} not found")
    try:
        text = (folder / _CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`model`: {folder.name}/{_CARD} is not a text in UTF-8; the folder is damaged") from error
    card = ModelCard.from_json(text, f"{folder.name}/{_CARD}")
    for name in (_GENES, _WEIGHTS):
        expected = card.files[name]
        found = _sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"`model` folder {folder.name!r}: {name} was altered or truncated (SHA-256 {found[:12]}…, the card says "
                f"{expected[:12]}…); fetch the folder again"
            )
    genes = read_genes(folder / _GENES, f"`model`: {folder.name}/{_GENES}")
    tensors = _read_tensors(folder / _WEIGHTS, f"`model`: {folder.name}/{_WEIGHTS}")
    if len(genes) != card.n_genes:
        raise ValueError(
            f"`model` folder {folder.name!r}: {len(genes)} genes in {_GENES}, {card.n_genes} in {_CARD}; they must agree"
        )
    check_tensors(card, tensors, f"`model`: {folder.name}/{_WEIGHTS}")
    _check_order(genes, tensors, f"`model`: {folder.name}/{_GENES}")
    return card, genes, tensors


def _check_order(genes: pd.DataFrame, tensors: dict[str, np.ndarray], where: str) -> None:
    """Refuse rows in another order than the weights: the heads of features that were centred have the means as bias."""
    mean, bias = genes["mean"].to_numpy(float), np.asarray(tensors.get("genes.bias", np.zeros(0)), float)
    if mean.shape != bias.shape:
        return
    off = np.flatnonzero(~np.isclose(mean, bias, rtol=1e-3, atol=1e-4) & np.isfinite(mean))
    if len(off) and np.allclose(np.sort(mean[off]), np.sort(bias[off]), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{where}: {len(off)} genes, such as {genes.index[off[:2]].tolist()}, have the means of one another: the rows are in "
            "another order than the weights, each gene would get the values of another; fetch the folder again"
        )


def _read_tensors(path: Path, where: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return {key: np.asarray(value) for key, value in load_file(path).items()}
    except Exception as error:  # safetensors has its own type, and numpy lacks some of its dtypes
        raise ValueError(f"{where} is not a safetensors file that numpy can read ({error})") from error


def save(card: ModelCard, genes: pd.DataFrame, tensors: dict[str, np.ndarray], path: str | Path) -> Path:
    """Write a model folder beside its place and move it there whole."""
    from safetensors.numpy import save_file

    check_tensors(card, tensors, f"model {card.name!r}")
    target = check_place(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # Not `ascontiguousarray`, which makes arrays of the counters of an encoder.
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, temporary / _WEIGHTS)
        columns = [*COLUMNS, *(name for name in FIGURES if name in genes)]
        genes.reset_index()[columns].to_csv(temporary / _GENES, index=False, float_format="%.5g")
        files = {name: _sha256(temporary / name) for name in (_GENES, _WEIGHTS)}
        card = replace(card, files=files)
        (temporary / _CARD).write_text(card.to_json(), encoding="utf-8")
        (temporary / _README).write_text(card.to_markdown(), encoding="utf-8")
        # mkdtemp and safetensors keep others out; a model is there to be read.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        _exchange(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return target


def _exchange(new: Path, target: Path) -> None:
    """Put a folder where another may be, keeping what is hidden in that (``.git``); other processes may do the same."""
    replaced: list[Path] = []
    for left in reversed(range(_TRIES)):
        old = new.with_name(f"{new.name}-old{left}")
        try:
            if target.exists():
                target.rename(old)
                replaced.append(old)
            new.rename(target)
            break
        except OSError:
            # Between two steps another process was faster.
            if replaced and not target.exists():
                replaced.pop().rename(target)
            if not left:
                raise
            time.sleep(0.05)
    for old in replaced:
        for entry in old.iterdir():
            if entry.name.startswith("."):
                entry.rename(target / entry.name)
        shutil.rmtree(old)


def _visible(folder: Path) -> set[str]:
    """Names in a folder but for hidden ones (.git, .DS_Store), which are kept; empty where there is none."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                # Held open, so that its number is not given to another folder meanwhile; Windows opens no folders.
                if os.name == "nt":
                    before = folder.stat()
                else:
                    opened = os.open(folder, os.O_RDONLY)
                    stack.callback(os.close, opened)
                    before = os.fstat(opened)
                found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
                if os.path.samestat(before, folder.stat()):
                    return found
            except (FileNotFoundError, NotADirectoryError):
                return set()
        # Exchanged by another process, which may have been emptying the old one.


def check_place(path: str | Path) -> Path:
    """Return the folder that a model may be written to; anything but a model folder there is an error."""
    # A link stays one, what it leads to is replaced.
    target = Path(path).expanduser().resolve()
    # One look: between two, another process that saves the same model may be exchanging it.
    is_folder = True
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        is_folder = stat.S_ISDIR(target.stat().st_mode)
    found = _visible(target)
    if not is_folder or (found and _CARD not in found):
        raise FileExistsError(f"`path` {str(path)!r} exists and is not a model folder; choose another or remove it")
    if target == Path.cwd():
        raise FileExistsError(
            f"`path` {str(path)!r} is the folder that this process works in, which saving would replace; choose another"
        )
    foreign = sorted(found - set(_FILES))
    if foreign:
        raise FileExistsError(
            f"`path` {str(path)!r} holds a model and {foreign[:5]}, which are not the model's and would be lost; move them or "
            "choose another folder"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"`path` {str(path)!r} cannot be written ({error.strerror}); choose another",
            str(target.parent),
        ) from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
