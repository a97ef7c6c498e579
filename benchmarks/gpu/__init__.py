"""The parts of `make gpu-check`; `benchmarks.gpu_check` puts them together."""
