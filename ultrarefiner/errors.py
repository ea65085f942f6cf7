"""The one exception that stands for a mistake of the user, not of the program."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a key, a value.

    Its text is one sentence that names what is wrong and says what to do. The entry points print it as
    ``error: ...`` without a stack trace and exit with a non-zero status.
    """

    def __str__(self) -> str:
        """The sentence alone, also where a loader's worker handed it on behind its stack trace."""
        return super().__str__().rpartition("errors.UserError: ")[2].strip()


class Paused(UserError):
    """Training stopped before its end, as it was asked to, with everything saved; the same command continues.

    The entry points exit with status 75, by which scripts know that there is more to do.
    """

    STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
