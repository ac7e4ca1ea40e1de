"""How the programs end where something is wrong: in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tokenfusion.cli.errors import UsageError


def reported(main: Callable[[], None]) -> None:
    """Runs main; an error that a user can mend is a line on standard error, of the first process alone."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UsageError as error:
        sys.exit(f"{name}: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
