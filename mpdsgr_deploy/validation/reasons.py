"""Reasons why a validation did not pass or ended early, with their condition or health check."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Reason(BaseModel):
    """One fault of an artefact or evaluation.

    condition: where the gate found it; check: the number of the failed health check; neither: the artefact as a whole.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    condition: str | None = None
    check: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Convert from reports before schema 3, which hold lines of text."""
        return {"text": value} if isinstance(value, str) else value

    def __str__(self) -> str:
        return self.line

    @property
    def line(self) -> str:
        if self.check is not None:
            return f"check {self.check}, {self.text}"
        return self.text if self.condition is None else f"{self.condition}: {self.text}"


class EarlyStop(BaseModel):
    """An evaluation that ended before all attacks were made. after: the condition it ended under, None: before any.

    The accuracy under all attacks is then an upper bound.
    """

    model_config = ConfigDict(frozen=True)

    after: str | None
    why: str

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Convert from reports before schema 3, which hold a line of text."""
        return {"after": None, "why": value} if isinstance(value, str) else value

    def __str__(self) -> str:
        return f"{self.moment}: {self.why}"

    @property
    def moment(self) -> str:
        return f"stopped after {self.after}" if self.after else "stopped before any attack"
