"""How a kernel fails: at which instruction, in which block and thread."""


class PtxError(AssertionError):
    """A kernel does what the hardware does not define, or what the interpreter does not know."""

    def __init__(self, message: str, kernel="", line=0, text="", block=None, thread=None):
        where = f"{kernel}, line {line}: {text}" if line else kernel
        if block is not None:
            where += f"\n    block {block}" + ("" if thread is None else f", thread {thread}")
        super().__init__(f"{message}\n    in {where}" if where else message)
        self.message, self.kernel, self.line, self.text = message, kernel, line, text
        self.block, self.thread = block, thread


class Fault(Exception):
    """Raised by an instruction, which does not know where it stands; `thread` is an index of the batch."""

    def __init__(self, message: str, thread: int | None = None):
        super().__init__(message)
        self.message, self.thread = message, None if thread is None else int(thread)
