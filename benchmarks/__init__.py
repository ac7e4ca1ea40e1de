"""Benchmarks: `pytest benchmarks/ --benchmark-only`, then `python -m benchmarks.report RECORD.json --out DIR`.

On a GPU `python -m benchmarks.gpu_check` runs them, and what else has to be seen there.
"""
