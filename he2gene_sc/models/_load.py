"""``hg.models.load`` loads a model by name, folder or address."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ._encoders.registry import EncoderSpec
from ._folder import read
from ._hub import PREFIX, fetch_folder
from ._model import HE2Gene

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).parent / "bundled"

#: Models inside the package.
BUNDLED: tuple[str, ...] = ("breast-her2st",)


def load(
    model: str | Path | HE2Gene = "breast-her2st",
    *,
    encoder: str | Path | tuple[torch.nn.Module, EncoderSpec] | None = None,
    allow_encoder_source: bool = False,
) -> HE2Gene:
    """Load a model by name, from its folder or from the Hugging Face hub.

    Parameters
    ----------
    model
        Name of a bundled model, path of a model folder, or ``"hf://owner/name@revision"``, whose four files are fetched into
        the hub's cache. The revision is a branch, tag or commit. Without one, the commit that is used is logged and kept in
        :attr:`HE2Gene.source`. A loaded model is returned.
    encoder
        Encoder of the model, as :func:`load_encoder` takes or returns it: your own network with its specification, if the model
        was trained on one, or local weights of any other encoder. Default: the encoder that the card names.
    allow_encoder_source
        Whether the card may name a repository or a folder (``hf-hub:``, ``local-dir:``) from which its encoder is loaded. If
        ``False``, the card may only name encoders of :data:`ENCODERS` and of timm.

    Returns
    -------
    HE2Gene
        The model.

    Raises
    ------
    ValueError
        If the name is unknown, or the folder is incomplete, truncated, altered, damaged or of a newer schema: the message
        names the file and the field. Also if the hub does not have the repository or the revision.
    RuntimeError
        If a repository is gated, or the hub cannot be reached and its cache does not hold the model.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.models.load("breast-her2st").card.classes[0]
    'adipose tissue'
    """
    if encoder is not None:
        from ._encoders.load import load_encoder

        given = load_encoder(encoder) if isinstance(encoder, str | Path) else encoder
        return replace(load(model), encoder=given)
    if allow_encoder_source:
        return replace(load(model), allow_encoder_source=True)
    if isinstance(model, HE2Gene):
        return model
    if not isinstance(model, str | Path):
        raise ValueError(f"`model` is a {type(model).__name__}; a name of {list(BUNDLED)}, a path or a model is needed")
    if isinstance(model, str) and model in BUNDLED:
        original = _load_bundled(model)
        # A user may change card and gene table; arrays and network are shared.
        card = copy.deepcopy(original.card)
        found = replace(original, card=card, genes=original.genes.copy(), tensors=dict(original.tensors))
        object.__setattr__(found, "_original", original)
        return found
    if isinstance(model, str) and model.startswith(PREFIX):
        fetched, source = fetch_folder(model)
        try:
            return replace(HE2Gene(*read(fetched)), source=source)
        except ValueError as error:
            raise ValueError(f"`model` {model!r}: {error}") from error
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"`model` {str(model)!r} is neither a bundled model, one of {list(BUNDLED)}, nor a folder; an address on the hub is "
            "written 'hf://owner/name'"
        )
    return HE2Gene(*read(folder))


@lru_cache(maxsize=4)
def _load_bundled(name: str) -> HE2Gene:
    return HE2Gene(*read(_ROOT / name))
