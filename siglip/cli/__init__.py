"""The command line: flags in, one call, lines out. Here siglip and data_pipelines are put together.

Exit codes: 0 on success, 2 on bad input, 1 on a failed run, 128 + the signal's number when a signal stopped a run whose
state was then saved. Bad input and failed runs are one line that says what is wrong and how to fix it (SIGLIP_TRACEBACK=1
shows where as well); anything else is a bug, of ours or of whoever changed the code: a traceback, and exit code 1.

The trap: importing jax takes seconds, so nothing here imports a command before it is called; `siglip --help` stays quick.
"""

import errno
import importlib.util
import logging
import os
import sys
import traceback

from data_pipelines import errors as data_errors
from siglip.cli import streams
from siglip.errors import BAD_PATH, RunFailed, UserError
from siglip.trees import did_you_mean

HELP = """usage: siglip COMMAND …

  train   CONFIG [--workdir DIR] [--total-steps N] [--batch-size N] …     pretrain; any config field is a flag
  eval    SRC --task TASK --data SHARDS [--out FILE.json]                 evaluate zero-shot
          SRC --suite FILE.yaml --out DIR                                 … on many data sets
  export  SRC --format hf|bigvision|… --out DIR …                         hand the encoder over, verified
  embed   SRC --data SHARDS|IMAGE_DIR|TEXT_FILE --out FILE|DIR            embed images or texts
  plan    CONFIG --topology v5e:16x16|h100:8|… [--compile] [--search]     does it fit, how long does it take
  report  WORKDIR…                                                        one page: curves, tables, images found; or a comparison
  demo    SRC --data SHARDS|IMAGE_DIR                                     search images in the browser, by text or by image
  data    index | pack | tokenizer | stats | curate SHARDS…               prepare data

SRC is a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
`siglip COMMAND --help` explains a command, `siglip train CONFIG --help` lists every config field.
"""

BAD_INPUT = (UserError, data_errors.UserError, *BAD_PATH)
FAILED = (RunFailed, data_errors.RunFailed, OSError, MemoryError)
# What jax says of the machine, not of the code: no GPU where JAX_PLATFORMS asks for one, no memory left on a device.
_MACHINE = ("Unable to initialize backend", "RESOURCE_EXHAUSTED")


def main() -> None:
    """Entry point of the console command."""
    streams.make_robust()
    code = run(sys.argv[1:])
    if code > 128:  # a signal: leaving Python would wait for threads that wait for storage
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        for arg in args:
            if (shown := arg.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")) != arg:
                raise UserError(f"'{shown}' is not UTF-8, as the files that name it are; rename it")
        if not args or args[0] in ("-h", "--help"):
            print(HELP, end="")
        elif args[0] == "--version":
            from siglip import __version__

            print(__version__)
        else:
            _prepare_environment()
            _dispatch(args[0], [expand_home(arg) for arg in args[1:]])
        sys.stdout.flush()  # here, where it still can fail
    except (Exception, KeyboardInterrupt) as error:
        code, line = describe(error)
        print(f"siglip: error: {line}", file=sys.stderr)
        return code
    return 0


def expand_home(arg: str) -> str:
    """`~/x` and `--flag=~/x` with the home folder in place of ~: shells leave it where it is quoted or follows a `=`."""
    flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return flag + equals + (os.path.expanduser(value) if value.startswith("~") else value)


def _prepare_environment() -> None:
    """What has to be said before jax and tensorflow are imported."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "siglip", "xla"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Orbax, absl and jax tell much about themselves. What fails in one of orbax's threads is raised by its next call as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.basicConfig(format="siglip: %(message)s", stream=sys.stderr)
    logging.getLogger("siglip").setLevel(logging.INFO)


def _dispatch(command: str, args: list[str]) -> None:
    if command == "train":
        from siglip.cli.training import train_command as call
    elif command == "eval":
        from siglip.cli.evaluation import eval_command as call
    elif command == "embed":
        from siglip.cli.embedding import embed_command as call
    elif command == "export":
        from siglip.cli.exporting import export_command as call
    elif command == "plan":
        from siglip.cli.planning import plan_command as call
    elif command == "report":
        from siglip.cli.reporting import report_command as call
    elif command == "demo":
        from siglip.cli.demo import demo_command as call
    elif command == "data":
        from siglip.cli.data import data_command as call
    else:
        commands = ["train", "eval", "export", "embed", "plan", "report", "demo", "data"]
        hint = did_you_mean(command, commands) or f"; there are {', '.join(commands)}"
        raise UserError(f"unknown command {command!r}{hint}")
    call(args)


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error; a bug, or any error when asked to, is printed with its traceback."""
    message, code = str(error) or {MemoryError: "out of memory"}.get(type(error), type(error).__name__), 1
    expected = True
    if isinstance(error, BAD_INPUT) or getattr(error, "errno", None) == errno.EROFS:
        code = 2
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    elif isinstance(error, FAILED):
        code = getattr(error, "exit_code", 1)
    elif package := _missing_package(error):
        message += f"; install that package: python -m pip install {package}"
    elif not (isinstance(error, RuntimeError) and message.startswith(_MACHINE)):
        expected, message = False, traceback.format_exception_only(error)[-1]
    if not expected or os.environ.get("SIGLIP_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.strerror and error.filename and error.errno:
        message = f"{error.filename}: {error.strerror}"
    return code, " ".join(message.split())


def _missing_package(error: BaseException) -> str | None:
    """The package that is not installed; None if something else is wrong with an import, such as a module of ours."""
    name = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    ours = name in (None, "siglip", "data_pipelines") or importlib.util.find_spec(name) is not None
    return None if ours else name
