"""Whole networks, trained by gradient."""
