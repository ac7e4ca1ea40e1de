"""How the programs end where something is wrong: in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tokenfusion.cli.errors import UsageError


def reported(main: Callable[[], None]) -> None:
    """Runs main; an error that a user can mend is a line on standard error, which names a process but the first."""
    name, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    try:
        main()
    except UsageError as error:
        sys.exit(f"{name}: {'' if rank == '0' else f'process {rank}: '}error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
