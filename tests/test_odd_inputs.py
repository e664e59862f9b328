"""A tenth of the odd inputs; ``python tests/benchmarks/bench_faults.py`` runs all of them."""

import pytest

from tests.helpers.odd import everything, outcome
from tests.helpers.odd.harness import GOOD

pytestmark = pytest.mark.slow

SHARE = 10


@pytest.mark.parametrize("odd", everything()[::SHARE], ids=lambda odd: odd.name)
def test_an_odd_input_is_answered_rightly_stated_or_refused_before_work(odd):
    kind, said = outcome(odd)
    assert kind in GOOD, f"{kind}: {said}"


def test_there_are_as_many_as_stated():
    assert len(everything()) >= 1500


def test_a_path_among_the_odd_values_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (odd,) = [odd for odd in everything() if odd.name == "train(cache=newline)"]
    outcome(odd)
    assert not list(tmp_path.iterdir())
