"""The file of a replay log: a header, then what an engine was told and asked, in order.

    magic "NFRL", version (1 byte), length of the header (uint32 LE), header (JSON, UTF-8), entries

An entry is a tag (1 byte) and what `LogWriter` and `LogReader` agree on behind it. Integers are
unsigned LEB128, signed ones in zigzag, texts their length and UTF-8. A file that ends in the middle
of an entry is the log of a process that was killed; what is complete counts.
"""

import struct
from enum import IntEnum

SUFFIX = ".replay"
"""How the names of logs end."""

MAGIC = b"NFRL"
VERSION = 1
HEADER = struct.Struct("<4sBI")
UINT32 = struct.Struct("<I")
FLOAT64 = struct.Struct("<d")


class Tag(IntEnum):
    """What an entry is. First the commands, then what is asked or told in the course of one."""

    ADD = ord("A")
    """A request is added."""
    ABORT = ord("X")
    """A request is aborted."""
    BUDGETS = ord("U")
    """Batches are formed by other budgets."""
    STEP = ord("S")
    """The loop does a step."""
    SETTLE = ord("T")
    """The loop commits an iteration and starts none."""
    FAIL = ord("F")
    """The loop ends what is in flight."""
    SYNC = ord("P")
    """The pages are asked whether something is on its way."""
    END = ord(".")
    """The log ends here, and why."""

    REFUSED = ord("N")
    """The request was not taken."""
    CLOCK = ord("C")
    """The time."""
    EVENT = ord("E")
    """Whether a copy has ended."""
    DISK_PAGES = ord("G")
    """What the disk holds at the start."""
    DISK_BUSY = ord("B")
    """Whether the disk takes a page."""
    DISK_WRITE = ord("W")
    """The slot that a page goes to."""
    DISK_READ = ord("R")
    """Whether a read has ended."""
    DISK_POLL = ord("D")
    """What the disk has done."""
    LAUNCH = ord("L")
    """A digest of a batch and its page tables."""
    RESULT = ord("Q")
    """The sampled ids."""
    UNLAUNCHED = ord("Y")
    """The iteration could not be launched."""
    FAILED = ord("Z")
    """The iteration failed, in place of a result."""
    OUTCOME = ord("O")
    """A digest of what a command gave."""


COMMANDS = frozenset(
    (Tag.ADD, Tag.ABORT, Tag.BUDGETS, Tag.STEP, Tag.SETTLE, Tag.FAIL, Tag.SYNC, Tag.END)
)


class LogEnd(IntEnum):
    """Why a log ends."""

    CLOSED = 0
    """The engine was shut down."""
    FULL = 1
    """It has reached its bound."""
    INTERRUPTED = 2
    """Something broke into a step where no log can say when, such as Ctrl-C."""
    CUT = 3
    """It just ends: the process was killed."""
