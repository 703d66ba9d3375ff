"""What is told in one line instead of a traceback: bad input, and a run that failed for a reason outside the program."""


class UserError(ValueError):
    """Bad input: value, constraint and fix in the message. The command line prints it as one line and exits with 2."""


class RunFailed(RuntimeError):
    """A run that started well and cannot go on (a worker killed, a non-finite loss): one line and exit code 1.

    Starting it again may help; whatever else is raised is a bug and keeps its traceback.
    """
