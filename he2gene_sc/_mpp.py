"""Where :mod:`he2gene_sc._core.mpp` stood; imports of it move over."""

from ._core.mpp import affine, check_mpp, resolve_mpp, stored_mpp

__all__ = ["affine", "check_mpp", "resolve_mpp", "stored_mpp"]
