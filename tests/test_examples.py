"""The examples run as their first lines say, without a network."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_attentive_probe(tmp_path):
    out = tmp_path / "probe.png"
    options = ["--model", "vit_tiny_patch16_224", "--images", "64", "--epochs", "2", "--heads", "3", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "attentive_probe.py"), *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, _, *rows, last = done.stdout.splitlines()
    assert "weights random" in first and "64 images of 10 classes" in first and str(out) in last
    accuracies, peaks = zip(*(re.findall(r"([\d.]+)%? ", row + " ")[::2] for row in rows), strict=True)
    assert accuracies[0] == accuracies[1] and float(peaks[1]) < float(peaks[0]) / 4
    assert out.stat().st_size > 10_000
