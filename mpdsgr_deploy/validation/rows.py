"""One row of a report: two networks judged on the same images."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.validation.statistics import mcnemar, wilson


class Score(BaseModel):
    """Correct images of n with a 95 % Wilson interval; `bitmap` holds each image's verdict, packed, as hex."""

    correct: int
    accuracy: float
    interval: tuple[float, float]
    bitmap: str

    @classmethod
    def of(cls, correct: NDArray[np.bool_]) -> "Score":
        """Summarise verdicts [N]."""
        count, n = int(correct.sum()), len(correct)
        accuracy = count / n if n else 0.0
        bitmap = np.packbits(correct).tobytes().hex()
        return cls(correct=count, accuracy=accuracy, interval=wilson(count, n), bitmap=bitmap)


class Flips(BaseModel):
    """Images whose verdict differs between reference and artefact, and how surprising that is."""

    newly_wrong: int
    newly_right: int
    p_value: float


class Row(BaseModel):
    """One condition: the torch reference and the artefact on the same images."""

    name: str
    settings: str
    n: int
    reference: Score
    artefact: Score
    flips: Flips

    @classmethod
    def of(cls, name: str, settings: str, reference: NDArray[np.bool_], artefact: NDArray[np.bool_]) -> "Row":
        """Pair the verdicts [N] of both networks."""
        worse, better = int((reference & ~artefact).sum()), int((~reference & artefact).sum())
        return cls(
            name=name,
            settings=settings,
            n=len(reference),
            reference=Score.of(reference),
            artefact=Score.of(artefact),
            flips=Flips(newly_wrong=worse, newly_right=better, p_value=mcnemar(worse, better)),
        )
