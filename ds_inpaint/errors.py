"""The failures a user can cause or cure, each with the exit code that scripts may rely on."""

from __future__ import annotations


class DsInpaintError(Exception):
    """A failure explained in one message: where, what was found, what is allowed, what to do.

    ``exit_code`` is what the process returns; every rank leaves with the same one.
    """

    exit_code = 1


class InputError(DsInpaintError):
    """Bad input: a recipe, an image, a mask, a model folder. Raised before anything is lost."""

    exit_code = 2


class UnusablePicture(InputError):
    """A picture, or its hole, that cannot be used.

    Args:
        message: the sentence.
        kind: a word or two that such problems share, for lists and counts of them.
    """

    def __init__(self, message: str, kind: str = "unusable picture") -> None:
        super().__init__(message)
        self.kind = kind


class RewardsUnavailable(DsInpaintError):
    """No usable scores within the retry budget, or too many invalid ones."""

    exit_code = 3


class UntrustworthyUpdate(DsInpaintError):
    """The doctor found numbers that a correct first update cannot have; nothing was trained."""

    exit_code = 4


class Stopped(DsInpaintError):
    """The run was asked to stop, and did so without losing an update; the same command goes on."""

    exit_code = 7


class NonFinite(DsInpaintError):
    """Numbers that are not finite, again and again; what was saved before is good."""

    exit_code = 8


class RowsRejected(DsInpaintError):
    """Everything was done, but some rows of the data could not be used; each is listed with its reason."""

    exit_code = 6


class PlanMismatch(DsInpaintError):
    """Ranks were about to run different numbers of forwards or backwards, which would hang."""

    exit_code = 5
