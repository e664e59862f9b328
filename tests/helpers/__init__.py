"""Small synthetic inputs with a known signal, for tests and benchmarks."""
