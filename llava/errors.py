"""Errors that are the user's to fix, and how every command reports them."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input, not a bug: the message names the thing and the fix, and no traceback is shown."""


def leave(message: str) -> None:
    if "tqdm.std" in sys.modules:  # a bar left open would share the message's line
        for bar in list(sys.modules["tqdm.std"].tqdm._instances):
            bar.close()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a UserError becomes one sentence and exit status 2, everything else a traceback."""
    try:
        main()
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # raised again by a data-loader worker, with the worker's traceback
            message = message.strip().splitlines()[-1].split(": ", 1)[1]
        leave(message)
    except OSError as error:
        if error.filename is None:
            raise
        leave(f"{error.filename}: {error.strerror}. Fix: check the path and its permissions")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
