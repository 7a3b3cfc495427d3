"""Each mistake gets an error that says what was wrong, where, and what to do."""

import re

import pytest

from tests.mistakes import MISTAKES, message_of


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
@pytest.mark.filterwarnings("ignore:Found (vars|plate statements|non-auxiliary)")
@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_message(call, kind, message):
    with pytest.raises(kind) as found:
        call()
    assert re.search(message, message_of(found.value), re.DOTALL)
