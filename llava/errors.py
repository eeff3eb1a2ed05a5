"""Errors that are the user's to fix, and how every command reports them."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input, not a bug: the message names the thing and the fix, and no traceback is shown."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a UserError becomes one sentence and exit status 2, everything else a traceback."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
