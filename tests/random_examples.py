"""How many random examples a test tries: they are others in each run."""

from hypothesis import settings

#: Of those that `make test-all` tries. `conftest.py` says what is run.
share = 1 / 3


def tries(most: int) -> settings:
    """A decorator for a test that tries so many examples where the slow tests are run too, and a third of them elsewhere."""
    return settings(max_examples=max(10, int(share * most)), deadline=None)
