"""Random programs with edits between steps: CompiledSVI equals SVI, or says so at an audit."""

from collections import Counter

import pytest

from tests.infer.svi.fuzzing.hidden_places import HIDDEN
from tests.infer.svi.fuzzing.places import PLACES
from tests.infer.svi.fuzzing.programs import Fuzzed


def tally(seeds):
    outcomes = {seed: Fuzzed(seed).outcome() for seed in seeds}
    print(Counter(outcomes.values()))
    failures = {
        seed: (text, Fuzzed(seed).names, Fuzzed(seed).edits)
        for seed, text in outcomes.items()
        if text not in ("graph", "eager", "suspect")
    }
    assert failures == {}
    return Counter(outcomes.values())


@pytest.mark.long
def test_some_programs():
    assert tally(range(12))["graph"] > 6


@pytest.mark.slow
def test_many_programs():
    assert tally(range(300))["graph"] > 200


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLACES, *HIDDEN])
def test_each_place_alone(name):
    program = Fuzzed(0)
    program.names = [name]
    program.edits = {5: [(name, 1.7)], 11: [(name, 2.9)]}
    outcome = program.outcome()
    print(name, outcome)
    assert outcome in (["graph"] if name in PLACES else ["graph", "suspect"])
