"""What a privacy parameter is printed as is never below it."""

import math

import pytest

from lightning_sfubm.callbacks.progress import spent_words
from lightning_sfubm.evaluation.facts import ledger_facts
from lightning_sfubm.privacy.rounding import round_up


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.49e-4, 1, "0.0002"),
        (1.49e-4, 2, "0.00015"),
        (1e-5, 2, "1e-05"),
        (0.1, 1, "0.1"),  # the double lies above .1, its spelling does not
        (0.001, 3, "0.001"),
        (2.0, 3, "2"),
        (7.994, 3, "8"),
        (7.991, 3, "8"),
        (9.991, 3, "10"),
        (1234.0, 3, "1.24e+03"),
        (0.0, 3, "0"),
        (math.inf, 3, "inf"),
    ],
)
def test_a_number_is_rounded_up(value: float, digits: int, text: str) -> None:
    assert round_up(value, digits) == text


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_no_number_is_printed_smaller_than_it_is(digits: int) -> None:
    for number in range(1, 2000):
        value = number / 7000
        assert value <= float(round_up(value, digits)) < value * (1 + 10 ** (1 - digits))


def test_the_terminal_and_the_report_of_a_run_round_up() -> None:
    assert spent_words({"privacy/epsilon": 1.2341, "privacy/delta": 1.49e-4}) == "epsilon 1.24 at delta 0.00015"
    # Lightning keeps metrics in single precision, where .001 is a little more than that
    assert spent_words({"privacy/epsilon": 2.0, "privacy/delta": 0.0010000000474974513}) == "epsilon 2 at delta 0.001"
    stated = {"differential privacy": {"epsilon": 1.23412, "delta": 1.49991e-4}}
    line = {"client": "a", "direction": "up", "kind": "teacher", "round": 1, "bytes": 1, "content_sha256": "0"}
    (row,) = ledger_facts([line | {"mechanism": stated, "tensors": {}}], 0)["rows"]
    assert "epsilon 1.235 at delta 0.00015" in row["mechanisms"][0]
