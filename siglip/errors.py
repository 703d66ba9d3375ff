"""What the command line tells in one line; any other exception is a bug and keeps its traceback."""


class UserError(ValueError):
    """Bad input: value, constraint and fix in the message. The command line prints it as one line and exits with 2."""


class RunFailed(RuntimeError):
    """A run that started well and cannot go on (a worker killed, a non-finite loss): one line and exit code 1.

    Starting it again may help, so launchers do.
    """

    exit_code = 1


class FailedAlone(RunFailed):
    """What not every process of a job raises: the others are gone, or in a step that this one cannot join."""


# Paths that a user names wrongly. Other OSErrors (a full disk, a network that is down) are the machine's.
BAD_PATH = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
