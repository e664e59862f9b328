"""Small inputs with a planted truth, for tests and benchmarks."""
