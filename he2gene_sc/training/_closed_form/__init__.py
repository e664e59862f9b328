"""Training of closed-form heads on frozen features."""
