"""Run a tenth of the odd inputs; ``python tests/benchmarks/bench_faults.py`` runs all of them."""

import pytest

from tests.helpers.odd import everything, outcome
from tests.helpers.odd.harness import GOOD

pytestmark = pytest.mark.slow

SHARE = 10


@pytest.mark.parametrize("odd", everything()[::SHARE], ids=lambda odd: odd.name)
def test_an_odd_input_gives_a_right_answer_a_warning_or_an_early_error(odd):
    kind, message = outcome(odd)
    assert kind in GOOD, f"{kind}: {message}"


def test_the_number_of_odd_inputs_is_as_documented():
    assert len(everything()) >= 1500


def test_an_odd_value_that_is_a_path_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (odd,) = [odd for odd in everything() if odd.name == "train(cache=newline)"]
    outcome(odd)
    assert not list(tmp_path.iterdir())
