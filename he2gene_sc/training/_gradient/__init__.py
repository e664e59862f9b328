"""Training of whole networks by gradient descent."""
