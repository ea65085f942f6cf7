"""The one exception that stands for a mistake of the user, not of the program."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a key, a value.

    Its text is one sentence that names what is wrong and says what to do. The entry points print it as
    ``error: ...`` without a stack trace and exit with a non-zero status.
    """
