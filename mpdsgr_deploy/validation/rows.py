"""Parts of a report: reasons of a verdict, and rows that compare artefact and reference under one condition."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.validation.proportions import mcnemar, wilson

TRANSFERRED = "transferred images"  # `Row.not_compared` of transferred attacks


class Reason(BaseModel):
    """One fault of an artefact or of its evaluation.

    condition: the condition in which the artefact breaks the gate. check: the number of the health check that failed.
    With neither, the fault concerns the artefact as a whole.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    condition: str | None = None
    check: int | None = None

    def __str__(self) -> str:
        return self.line

    @property
    def line(self) -> str:
        if self.check is not None:
            return f"check {self.check}, {self.text}"
        return self.text if self.condition is None else f"{self.condition}: {self.text}"


class EarlyStop(BaseModel):
    """Where and why an evaluation ended early, which makes the accuracy under all attacks an upper bound.

    after: the condition that was being evaluated; None if it ended before any attack.
    """

    model_config = ConfigDict(frozen=True)

    after: str | None
    why: str

    def __str__(self) -> str:
        return f"{self.moment}: {self.why}"

    @property
    def moment(self) -> str:
        return f"stopped after {self.after}" if self.after else "stopped before any attack"


class Score(BaseModel):
    """How many of n images are correct, the share, and its 95 % Wilson interval; bitmap: packed verdicts, as hex."""

    correct: int
    accuracy: float
    interval: tuple[float, float]
    bitmap: str

    @classmethod
    def of(cls, correct: NDArray[np.bool_]) -> "Score":
        count, n = int(correct.sum()), len(correct)
        accuracy = count / n if n else 0.0
        bitmap = np.packbits(correct).tobytes().hex()
        return cls(correct=count, accuracy=accuracy, interval=wilson(count, n), bitmap=bitmap)

    def verdicts(self, n: int) -> NDArray[np.bool_]:
        """Return the verdicts [n], True where the prediction was right. n: the number of images."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.bitmap), np.uint8))[:n].astype(bool)


class VerdictFlips(BaseModel):
    """How many verdicts differ between reference and artefact, and the p-value of McNemar's exact test."""

    newly_wrong: int
    newly_right: int
    p_value: float

    @classmethod
    def of(cls, reference: NDArray[np.bool_], artefact: NDArray[np.bool_]) -> "VerdictFlips":
        """Compare verdicts [n] of reference and artefact on the same images."""
        worse, better = int((reference & ~artefact).sum()), int((~reference & artefact).sum())
        return cls(newly_wrong=worse, newly_right=better, p_value=mcnemar(worse, better))

    @property
    def p_text(self) -> str:
        """The p-value as text; "-" if no image differs, because then nothing was tested."""
        return f"{self.p_value:.2g}" if self.newly_wrong + self.newly_right else "-"


class Row(BaseModel):
    """The artefact, and the reference if there is one, under one condition on n images.

    settings: the attack's strength, in words. eps: the L-infinity bound, None if the condition has none. reference: the
    torch network under the same attack on itself. evaluations: mean number of gradients, or queries, per image.
    surrogate: through which a strong white-box attack differentiated. at_most: whether the accuracy is an upper bound,
    because attacks or images are missing. not_compared: why there is no reference. detectable: the smallest drop that
    the gate would have refused with a probability of 90 %.
    """

    name: str
    settings: str
    eps: float | None
    n: int
    artefact: Score
    reference: Score | None = None
    flips: VerdictFlips | None = None
    evaluations: float = 0.0
    surrogate: str | None = None
    at_most: bool = False
    not_compared: str | None = None
    detectable: float | None = None

    @property
    def comparable(self) -> bool:
        """Whether a reference can have verdicts under this condition; under transferred attacks it never has."""
        return self.not_compared != TRANSFERRED

    @classmethod
    def of(
        cls,
        name: str,
        settings: str,
        artefact: NDArray[np.bool_],
        *,
        eps: float | None = None,
        reference: NDArray[np.bool_] | None = None,
        flips: VerdictFlips | None = None,
        evaluations: int = 0,
        surrogate: str | None = None,
        at_most: bool = False,
        not_compared: str | None = None,
    ) -> "Row":
        """Return the row of the artefact's verdicts [n] and the reference's verdicts [n] on the same images.

        flips: those to show if they are not the ones between `artefact` and `reference`. evaluations: in total. Others:
        see the class.
        """
        paired = None if reference is None else VerdictFlips.of(reference, artefact)
        return cls(
            name=name,
            settings=settings,
            eps=eps,
            n=len(artefact),
            artefact=Score.of(artefact),
            reference=None if reference is None else Score.of(reference),
            flips=flips or paired,
            evaluations=evaluations / max(1, len(artefact)),
            surrogate=surrogate,
            at_most=at_most,
            not_compared=None if reference is not None else not_compared,
        )
