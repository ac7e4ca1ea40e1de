"""Runs PTX on a CPU, for tests: what a GPU would do, and errors where it would be free to do anything."""
