"""The parts of benchmarks.gpu_suite, a file per subject."""
