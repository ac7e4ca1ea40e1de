"""What a command reports to its user in one line, without a traceback."""


class UsageError(Exception):
    """An argument that cannot be used; the message names it, what came and what was expected."""


def first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
