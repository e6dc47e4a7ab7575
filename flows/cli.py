"""The command `requant`: one sentence for every mistake, one exit code for every outcome."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from cyclopts import App
from cyclopts.exceptions import CycloptsError

from flows.commands import artifacts, conversions, machine, models, recipes
from flows.terminal import ERR
from pipeline import __version__
from pipeline.errors import InputError, RequantError, StageFailed

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C

app = App(
    name="requant",
    help="Dequantize, train and requantize a model: one recipe, one command, one schedule.",
    version=__version__,
    help_epilogue="Exit codes: 0 done, 1 failed in work, 2 wrong input, 3 a gate refused. --debug shows a traceback.",
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)
GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "A recipe": (recipes.run, recipes.plan, recipes.train, recipes.init, recipes.schema),
    "A model": (models.inspect, models.try_, conversions.upcast, conversions.quantize, models.evaluate),
    "This machine": (machine.doctor, machine.formats),
}
for group, commands in GROUPS.items():
    for command in commands:
        app.command(command, group=group, name=command.__name__.rstrip("_"))
app.command(artifacts.app)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; return its exit code. A mistake is one sentence on standard error."""
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except CycloptsError as error:
        return _say(f"{error}; see requant --help", InputError.exit_code, debug=debug)
    except RequantError as error:
        if debug and isinstance(error, StageFailed):
            ERR.print(error.trace, markup=False)
        return _say(str(error), error.exit_code, debug=debug)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on from here", INTERRUPTED, debug=False)
    except BrokenPipeError:  # the reader of standard output has gone, as with `| head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder that may not be read or written, a disk that fails
        return _say(f"{error.filename or 'the system'}: {error.strerror or error}", 1, debug=debug)
    return 0


def _say(sentence: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    ERR.print(f"requant: {' '.join(sentence.split())}", markup=False, soft_wrap=True)
    return code
