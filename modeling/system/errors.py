"""Mistakes of a user and failures of the machine end a script in one line; anything else is a bug with a traceback."""

import contextlib
import sys
from collections.abc import Iterator

from modeling.system.credentials import masked
from modeling.system.startup import prepare_process


class UserError(ValueError):
    """Something that the user can mend: the message names what was got, what was expected and the remedy."""


class Failed(SystemExit):
    """A script has ended with one line, which is printed already.

    Args:
        message: the line.
        code: the exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


@contextlib.contextmanager
def errors_in_one_line(exit_code: int = 1) -> Iterator[None]:
    """Wraps every script: a UserError, a failing disk or numbers that are not finite end it with one line."""
    try:
        prepare_process()
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # what Python cannot write at its exit is no error of one line
    except (UserError, FloatingPointError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    else:
        return
    print(masked(message), file=sys.stderr)
    raise Failed(message, exit_code)
