"""Frozen features, closed-form heads."""
