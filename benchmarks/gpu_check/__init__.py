"""`python -m benchmarks.gpu_check`: everything that has to be seen on a GPU, in one unattended run and one record."""
