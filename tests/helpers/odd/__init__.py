"""Hundreds of odd and damaged inputs for the verbs, readers, model folders and the command line.

Every input is an :class:`~tests.helpers.odd.harness.Odd`; ``everything()`` makes them all, :func:`~tests.helpers.odd.harness.outcome` runs one and says what
became of it. ``tests/test_odd_inputs.py`` runs a tenth, ``tests/benchmarks/bench_faults.py`` all of them.
"""

from itertools import chain

from tests.helpers.odd import cohorts, files, folders, parameters, shell, tables
from tests.helpers.odd.harness import Odd, outcome

__all__ = ["Odd", "everything", "outcome"]


def everything() -> list[Odd]:
    """Return all odd inputs, in a fixed order and with unique names."""
    found = list(
        chain.from_iterable(part.odd_inputs() for part in (tables, parameters, files, folders, shell, cohorts))
    )
    names = [odd.name for odd in found]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1][:5]
    return found
