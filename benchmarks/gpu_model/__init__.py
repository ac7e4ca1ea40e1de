"""`python -m benchmarks.gpu_model`: how fast the GPU kernels can be, by their machine code and by PTX that was run."""
