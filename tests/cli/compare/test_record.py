import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from tokenfusion.cli.compare import record
from tokenfusion.cli.errors import UsageError

FACTS = {"a": [1, 2]}


def test_replaces_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("x" * 1000)
    with record.opened(path) as write:
        assert path.read_text() == "x" * 1000
        write(FACTS)
    assert json.loads(path.read_text()) == FACTS


@pytest.mark.parametrize("before", [None, "before"])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "record.json"
    if before:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), record.opened(path):
        raise KeyboardInterrupt
    assert (path.read_text() if path.exists() else None) == before


def test_a_full_device_is_known_before_the_work():
    with (
        pytest.raises(UsageError, match="--json: /dev/full: No space left on device"),
        record.opened(Path("/dev/full")),
    ):
        raise AssertionError("it was not seen")


def test_a_disk_that_fills_up_later_leaves_the_results_on_the_terminal(tmp_path):
    path, limits = tmp_path / "record.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UsageError, match="File too large; the results are those above"):
            with record.opened(path) as write:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
                write(FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_pipes(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="pipe: No such device or address"), record.opened(path):
        pass  # nobody reads
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    while True:
        try:
            with record.opened(path) as write:
                write(FACTS)
            break
        except UsageError:  # the reader has not come yet
            continue
    reader.join()
    assert json.loads(read[0]) == FACTS
