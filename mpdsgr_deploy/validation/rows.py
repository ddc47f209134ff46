"""The parts of a report: reasons, and rows with the artefact under one condition beside its reference."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.validation.proportions import mcnemar, wilson

TRANSFERRED = "transferred images"  # reason why rows of transferred images are not compared


class Reason(BaseModel):
    """One fault of an artefact or evaluation.

    condition: where the gate found it; check: the number of the failed health check; neither: the artefact as a whole.
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
    """An evaluation that ended before all attacks were made. after: the condition it ended under, None: before any.

    The accuracy under all attacks is then an upper bound.
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
    """The number of correct images of n with a 95 % Wilson interval; `bitmap` packs the verdicts, as hex."""

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
        """Return the verdicts [n] on the n images: True where the prediction was right."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.bitmap), np.uint8))[:n].astype(bool)


class VerdictFlips(BaseModel):
    """Images whose verdict differs between reference and artefact, with McNemar's exact p-value."""

    newly_wrong: int
    newly_right: int
    p_value: float

    @classmethod
    def of(cls, reference: NDArray[np.bool_], artefact: NDArray[np.bool_]) -> "VerdictFlips":
        worse, better = int((reference & ~artefact).sum()), int((~reference & artefact).sum())
        return cls(newly_wrong=worse, newly_right=better, p_value=mcnemar(worse, better))

    @property
    def p_text(self) -> str:
        """The p-value as text; "-" if no image differs, because then nothing was tested."""
        return f"{self.p_value:.2g}" if self.newly_wrong + self.newly_right else "-"


class Row(BaseModel):
    """One condition. eps: the L-infinity bound, None where there is none; reference: the torch network under the same
    attack on itself; evaluations: the average number of gradients, or queries, per image.

    surrogate: the one that a strong white-box attack used. at_most: the accuracy is an upper bound, because not all
    attacks were made or not all images attacked. not_compared: why there is no reference. detectable: the smallest drop
    of accuracy that the gate refuses with a probability of 90 %, at the rate at which verdicts flip here.
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
        """Whether a reference could have met this condition: it never meets transferred images."""
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
        """Make a row from the artefact's verdicts [N], and the reference's [N] on the same images.

        flips: given if they are those of other verdicts than these two.
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
