"""Python's search for garbage, which took half the time of the tests that make many small objects."""

import gc


def look_among_what_comes() -> None:
    """What is there by now, such as all imported modules, is never looked through again, and the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 5, 5)
