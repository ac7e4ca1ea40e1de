"""What `make quick` runs."""

from tests.conftest import ROOT


def test_every_operator_is_tested_on_every_backend():
    chosen = {line.split("::")[0] for line in (ROOT / "tests/quick.txt").read_text().splitlines()}
    there = {str(path.relative_to(ROOT)) for name in ("cpu", "triton") for path in ROOT.glob(f"tests/*/test_{name}.py")}
    assert there - chosen == set()
