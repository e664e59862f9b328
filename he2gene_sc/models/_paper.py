"""Read the networks of the HE2Gene paper from the ``.pt`` files that its authors publish.

Layout and constants follow github.com/Microbiods/HE2Gene (``src/models/resnet.py``, ``src/patch_pred.py``):
torchvision's ResNet-50 without its last layer, and three linear heads on its 2,048 features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from ..image._geometry import check_windows
from ._card import ModelCard
from ._gene_table import check_identifiers, is_gene_name
from ._model import HE2Gene
from ._tensors import ENCODER

if TYPE_CHECKING:
    import torch

#: Channels of the training patches of the paper, after scaling to 0..1.
PAPER_MEAN, PAPER_STD = (0.5319, 0.5080, 0.6824), (0.2442, 0.2063, 0.1633)
#: Rounded sides of 75, 150 and 225 px in the images of HBCIS.
PAPER_WINDOWS_UM = (50.0, 100.0, 150.0)
#: µm per pixel of HBCIS and her2st (except A), and the same windows in pixels.
PAPER_MPP = 0.69
PAPER_WINDOWS_PX = (75, 150, 225)

#: Names of the target, auxiliary and tumour heads in each layout.
_HEADS = {"he2gene-base": ("fc1", "fc2", "fc3"), "he2gene-spat": ("fc", "fc_aux", "fc_tmr")}
_BASE = "base_model."
_ENCODER, _N_FEATURES = "resnet50", 2048
_MAX_LISTED = 6


def from_checkpoint(
    path: str | Path,
    preset: str,
    target_genes: Sequence[str] | str | Path,
    aux_genes: Sequence[str] | str | Path,
    *,
    name: str | None = None,
    version: str = "1",
    description: str = "",
    windows_um: Sequence[float] = PAPER_WINDOWS_UM,
    ensembl_ids: Mapping[str, str] | None = None,
    intended_use: str = "Research use only.",
    license: str = "unknown (the code of HE2Gene is MIT)",
) -> HE2Gene:
    """Read a network of the HE2Gene paper from the ``.pt`` file that its authors publish.

    Predictions are averaged over three windows and the eight symmetries of the square, as in the paper. They equal
    those of the authors' code, except that negative values become 0.

    Parameters
    ----------
    path
        A ``state_dict`` of ``AuxAnnotateResNet50`` or ``AuxAnnotateSpatialResNet50``, bare or under
        ``"state_dict"`` or ``"model_state_dict"``, with or without the ``module.`` of ``DataParallel``. Only tensors are
        read (``weights_only=True``): nothing in the file can run.
    preset
        ``"he2gene-base"`` or ``"he2gene-spat"``.
    target_genes, aux_genes
        Genes in the order of the two heads, or text files with one gene per line (``src/target_genes.txt`` and
        ``data/breast/full_aux_genes.txt`` of the authors' repository).
    name, version, description, intended_use, license
        Texts of the card. The default name is that of the preset.
    windows_um
        Sides of the windows, µm. The paper's 75, 150 and 225 px are about 50, 100 and 150 µm; at the 0.69 µm/px of HBCIS
        they are 51.75, 103.5 and 155.25 µm.
    ensembl_ids
        Ensembl ids by symbol, for the gene table; genes that are named by an Ensembl id need none.

    Returns
    -------
    HE2Gene
        The model, for ``hg.tl.predict(sdata, model=model)`` or ``.save(path)``. It has no held-out metrics:
        ``genes["pcc"]`` is NaN and no gene is called reliable.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is truncated, holds pickled objects, or has another layout, if its numbers of genes differ from the
        lists, if genes occur twice, or if a name, id or text cannot be stored.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> model = hg.models.from_checkpoint("he2gene.pt", "he2gene-base", "target.txt", "aux.txt")  # doctest: +SKIP
    """
    validate.one_of(preset, _HEADS, "preset")
    windows_um = check_windows(windows_um)
    texts = {"description": description, "intended_use": intended_use, "license": license}
    for parameter, text in ({"name": name or preset, "version": version} | texts).items():
        if not isinstance(text, str) or (parameter not in texts and not text.strip()):
            raise ValueError(f"`{parameter}` is {text!r}; a text is needed")
    known = dict(ensembl_ids or {})
    check_identifiers(known)
    file = validate.folder_or_file(path, "path")
    target, aux = _names(target_genes, "target_genes"), _names(aux_genes, "aux_genes")
    names = pd.Index(target + aux, name="gene")
    if names.has_duplicates:
        twice = list(names[names.duplicated()].unique())
        raise ValueError(
            f"`target_genes`, `aux_genes`: {len(twice)} genes occur twice, first {twice[:_MAX_LISTED]}; every output of the "
            "network needs a unique name"
        )
    from ._encoders.load import encoder_sha256, load_encoder
    from ._encoders.local import check_finite, read_state

    if not file.is_file():
        raise FileNotFoundError(f"`path` {str(file)!r} is not a file")
    state = read_state(file, "path")
    _check_layout(state, preset)
    check_finite(state, "path", file)
    encoder, spec = load_encoder(_ENCODER, pretrained=False)
    try:
        # torchvision and timm use the same names of layers.
        encoder.load_state_dict({key.removeprefix(_BASE): state[key] for key in state if key.startswith(_BASE)})
    except RuntimeError as error:
        raise ValueError(f"`path`: {_BASE}* is not a ResNet-50 with torchvision's names of layers: {error}") from error
    heads = _heads(state, preset, {"target_genes": len(target), "aux_genes": len(aux)})
    own = {ENCODER + key: value for key, value in encoder.state_dict().items()}
    tensors = {key: np.asarray(value.numpy(), order="C") for key, value in (heads | own).items()}
    genes = pd.DataFrame(
        {
            "ensembl_id": [known.get(g, g.split(".")[0] if re.match(r"ENSG\d{11}(\.\d+)?$", g) else "") for g in names],
            "group": ["target"] * len(target) + ["auxiliary"] * len(aux),
            "variable": False,
            **dict.fromkeys(("mean", "pcc", "pcc_low", "skill"), np.nan),
            "reliable": False,
        },
        index=names,
    )
    card = ModelCard(
        name=name or preset,
        version=version,
        description=description
        or f"The network {preset} of the HE2Gene paper (Bioinformatics 2024, btae343), read from {file.name}.",
        encoder={
            "name": spec.name,
            "license": license,
            "sha256": encoder_sha256(encoder),
            "input_px": spec.input_px,
            "mean": list(PAPER_MEAN),
            "std": list(PAPER_STD),
        },
        windows_um=windows_um,
        classes=("normal", "tumour"),
        class_colors=("#2ca02c", "#d62728"),
        n_genes=len(names),
        n_latent=len(tensors["genes.weight"]),
        training={
            "sections": {},
            "preset": preset,
            "by": "the authors of the paper: 18 patients of HBCIS by their account, not checked here",
        },
        metrics={"held-out figures": "unknown: read from a checkpoint, nothing was held out here"},
        reliable_rule="This model has no held-out metrics, so no gene is reliable",
        intended_use=intended_use,
        limitations=(
            "How well it predicts any gene on any tissue is unknown until it is tested there.",
            "It was trained on fresh frozen breast cancer sections of one study, at about 0.69 µm/px.",
            "The probabilities of its annotation are not calibrated.",
            "Negative predictions are set to 0.",
        ),
        license=license,
        fusion="mean",
        tta=True,
    )
    return HE2Gene(card, genes, tensors)


def _names(genes: Sequence[str] | str | Path, parameter: str) -> list[str]:
    if isinstance(genes, str | Path):
        file = Path(genes).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"`{parameter}` {str(genes)!r} is not a file; a list of genes or a text file is needed"
            )
        genes = file.read_text(encoding="utf-8").splitlines()
        genes = [line for line in genes if line.strip()]
    names = [str(gene).strip() for gene in genes]
    if wrong := [name for name in names if not is_gene_name(name)]:
        raise ValueError(
            f"`{parameter}` holds {wrong[:_MAX_LISTED]}, which cannot be names of genes; correct or leave them out"
        )
    return names


def _check_layout(state: dict[str, torch.Tensor], preset: str) -> None:
    """Raise unless the file has exactly the three heads of the preset and the encoder."""
    outside = {key for key in state if not key.startswith(_BASE)}
    heads = sorted({key.rsplit(".", 1)[0] for key in outside})
    expected = [f"{head}.{part}" for head in _HEADS[preset] for part in ("weight", "bias")]
    if len(outside) < len(state) and outside == set(expected):
        return
    other = next((name for name, wanted in _HEADS.items() if sorted(wanted) == heads), None)
    hint = f"; that is the layout of preset {other!r}" if other is not None and other != preset else ""
    raise ValueError(
        f"`path` is not a {preset!r}: expected {_BASE}* and {expected}, found {heads[:_MAX_LISTED]} and "
        f"{len(state) - len(outside)} tensors of {_BASE}*{hint}"
    )


def _heads(state: dict[str, torch.Tensor], preset: str, n_genes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Rename the heads as in a model folder; raise if they do not fit the encoder or the lists of genes."""
    import torch

    target, aux, tumour = ((state[f"{h}.weight"].float(), state[f"{h}.bias"].float()) for h in _HEADS[preset])
    for name, (weight, bias) in {"target_genes": target, "aux_genes": aux, "tumour": tumour}.items():
        n = bias.numel() if name in n_genes else 1
        if weight.shape != (n, _N_FEATURES) or bias.shape != (n,):
            raise ValueError(
                f"`path`: the head of `{name}` has shape {tuple(weight.shape)} and biases of shape {tuple(bias.shape)}; "
                f"({n}, {_N_FEATURES}) and ({n},) are needed"
            )
        if n != n_genes.get(name, 1):
            raise ValueError(f"`{name}` names {n_genes[name]} genes, the network has {n}")
    return {
        "genes.weight": torch.cat([target[0], aux[0]]).T,
        "genes.bias": torch.cat([target[1], aux[1]]),
        # A sigmoid of z is a softmax of (0, z).
        "annotation.weight": torch.cat([torch.zeros(1, _N_FEATURES), tumour[0]]).T,
        "annotation.bias": torch.cat([torch.zeros(1), tumour[1]]),
    }
