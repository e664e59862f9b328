"""Cross-validation behind ``he2gene benchmark``."""
