"""Gates that so few images can decide that every outcome can be tried out."""

import pytest

from mpdsgr_deploy.validation import gate as rules_of_the_gate


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that so few images can decide as can be tried out one by one: p < 0.05, five flips."""
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", 0.05)
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT_OVERALL", 0.05)
