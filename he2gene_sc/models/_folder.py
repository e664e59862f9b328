"""Read model folders, with checks of every file, and write them atomically."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import stat
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from ._card import ModelCard
from ._gene_table import COLUMNS, FIGURES, read_genes
from ._hub import FILES
from ._tensors import check_tensors

_CARD, _GENES, _WEIGHTS, _README = FILES
#: Attempts to replace a folder while other processes write the same model.
_TRIES = 20


def read(folder: Path) -> tuple[ModelCard, pd.DataFrame, dict[str, np.ndarray]]:
    """Read and check the card, the gene table and the tensors."""
    if missing := [name for name in (_CARD, _GENES, _WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(f"`model` folder {folder.name!r} is incomplete: {missing} not found")
    try:
        text = (folder / _CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`model`: {folder.name}/{_CARD} is not a text in UTF-8; the folder is damaged") from error
    card = ModelCard.from_json(text, f"{folder.name}/{_CARD}")
    for name in (_GENES, _WEIGHTS):
        expected, found = card.files[name], _sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"`model` folder {folder.name!r}: {name} was altered or truncated (SHA-256 {found[:12]}…, the card says "
                f"{expected[:12]}…); fetch the folder again"
            )
    genes = read_genes(folder / _GENES, f"`model`: {folder.name}/{_GENES}")
    where = f"`model`: {folder.name}/{_WEIGHTS}"
    try:
        tensors = load_file(folder / _WEIGHTS)
    except Exception as error:  # safetensors raises its own type, and numpy lacks some dtypes
        raise ValueError(f"{where} is not a safetensors file that numpy can read ({error})") from error
    if len(genes) != card.n_genes:
        raise ValueError(
            f"`model` folder {folder.name!r}: {len(genes)} genes in {_GENES}, {card.n_genes} in {_CARD}; they must agree"
        )
    check_tensors(card, tensors, where)
    # For centred features, biases are the means of genes.
    mean, bias = genes["mean"].to_numpy(float), np.asarray(tensors["genes.bias"], float)
    mismatched = np.flatnonzero(~np.isclose(mean, bias, rtol=1e-3, atol=1e-4) & np.isfinite(mean))
    if len(mismatched) and np.allclose(np.sort(mean[mismatched]), np.sort(bias[mismatched]), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"`model`: {folder.name}/{_GENES}: the means of {len(mismatched)} genes are exchanged, such as "
            f"{genes.index[mismatched[:2]].tolist()}: the rows are in another order than the weights, and each gene would get the values "
            "of another; fetch the folder again"
        )
    return card, genes, tensors


def save(card: ModelCard, genes: pd.DataFrame, tensors: dict[str, np.ndarray], path: str | Path) -> Path:
    """Write a model folder to a temporary folder, read it back, and move it to ``path``."""
    check_tensors(card, tensors, f"model {card.name!r}")
    target = check_place(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # Not `ascontiguousarray`, which would turn scalar counters of an encoder into arrays.
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, temporary / _WEIGHTS)
        columns = [*COLUMNS, *(name for name in FIGURES if name in genes)]
        genes.reset_index()[columns].to_csv(temporary / _GENES, index=False, float_format="%.5g")
        card = replace(card, files={name: _sha256(temporary / name) for name in (_GENES, _WEIGHTS)})
        (temporary / _CARD).write_text(card.to_json(), encoding="utf-8")
        try:
            read(temporary)
        except ValueError as error:
            found = re.sub("[.;] [Ff]etch the folder again$", "", str(error).replace(temporary.name, target.name))
            raise ValueError(f"the model is not saved, since its folder could not be loaded: {found}") from error
        (temporary / _README).write_text(card.to_markdown(), encoding="utf-8")
        # mkdtemp and safetensors create private files, but a model should be readable by others.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        _replace_folder(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return target


def _replace_folder(new: Path, target: Path) -> None:
    """Move a folder to ``target``, keeping hidden entries of an older one (``.git``); other processes may do the same."""
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
            # Another process replaced the folder between two steps.
            if replaced and not target.exists():
                with contextlib.suppress(OSError):
                    replaced[-1].rename(target)
                    replaced.pop()
            if not left:
                raise
            time.sleep(0.05)
    for old in replaced:
        for entry in old.iterdir():
            if entry.name.startswith("."):
                entry.rename(target / entry.name)
        shutil.rmtree(old)


def _list_visible(place: Path) -> set[str] | None:
    """Return the names in a folder except hidden ones (.git, .DS_Store), which are kept; ``None`` for anything but a folder."""
    while True:
        try:
            before = place.stat()
            if not stat.S_ISDIR(before.st_mode):
                return None
            found = {path.name for path in place.iterdir() if not path.name.startswith(".")}
            after = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            return set()
        if (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
            return found
        # Another process replaced the folder, and may have been emptying the old one: list again.


def check_place(path: str | Path) -> Path:
    """Return the folder that a model is written to; raise if it exists and is not a model folder."""
    # A link is kept; its target is replaced.
    target = Path(path).expanduser().resolve()
    found = _list_visible(target)
    problem = None
    if found is None or (found and _CARD not in found):
        problem = "exists and is not a model folder; choose another or remove it"
    elif target == Path.cwd():
        problem = "is the current working directory, which saving would replace; choose another"
    elif foreign := sorted(found - set(FILES)):
        problem = (
            f"holds a model and {foreign[:5]}, which are not part of the model and would be lost; "
            "move them or choose another folder"
        )
    if problem is not None:
        raise FileExistsError(f"`path` {str(path)!r} {problem}")
    check_writable(target.parent, path, "path")
    return target


def check_writable(folder: Path, path: str | Path, parameter: str) -> None:
    """Create a folder for ``path``; raise if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"`{parameter}` {str(path)!r} cannot be written ({error.strerror}); choose another"
        raise OSError(error.errno, reason, str(folder)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
