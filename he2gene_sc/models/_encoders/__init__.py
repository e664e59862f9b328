"""Encoders: their specifications, weights, stages and inputs."""
