import pytest


@pytest.fixture(autouse=True)
def one_thread(one_thread):
    """In every test here."""
