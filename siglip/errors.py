"""The one error that is the user's: bad input, told in one line that says what is wrong and how to fix it."""


class UserError(ValueError):
    """Bad input: value, constraint and fix in the message. The command line prints it as one line and exits with 2.

    Everything else that is raised is a bug or a failed run and keeps its traceback.
    """
