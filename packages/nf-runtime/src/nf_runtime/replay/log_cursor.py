"""Where a replay is in its log."""

from nf_runtime.replay.log_format import COMMANDS, LogEnd, Tag
from nf_runtime.replay.log_reader import LogReader

_MEANINGS = {
    Tag.REFUSED: "a request was refused",
    Tag.CLOCK: "the time was asked for",
    Tag.EVENT: "a copy was asked for its end",
    Tag.DISK_PAGES: "the disk was asked what it holds",
    Tag.DISK_BUSY: "the disk was asked whether it takes a page",
    Tag.DISK_WRITE: "a page was written to the disk",
    Tag.DISK_READ: "a read of the disk was asked for its end",
    Tag.DISK_POLL: "the disk was asked what it has done",
    Tag.LAUNCH: "an iteration was launched",
    Tag.RESULT: "an iteration gave its tokens",
    Tag.UNLAUNCHED: "an iteration could not be launched",
    Tag.FAILED: "an iteration failed",
    Tag.OUTCOME: "the step was over",
}


class DivergenceError(Exception):
    """A replay does something else than the log says."""


class LogEndedError(Exception):
    """A replay has come to the end of its log.

    Attributes:
        reason: Why the log ends.
    """

    def __init__(self, reason: LogEnd) -> None:
        super().__init__(reason.name)
        self.reason = reason


class LogCursor:
    """Hands out what a log has, in order, to those who ask for it.

    Args:
        log: To read.

    Attributes:
        log: As given.
        time: That was asked for last, seconds.
    """

    def __init__(self, log: LogReader) -> None:
        self.log = log
        self.time = 0.0
        self._microseconds = 0

    def clock(self) -> float:
        """The time that the log says it is."""
        self._microseconds += self.expect(Tag.CLOCK, "the time").number()
        self.time = self._microseconds * 1e-6
        return self.time

    def expect(self, tag: Tag, wanted: str) -> LogReader:
        """Go on to the content of the next entry.

        Args:
            tag: What it has to be.
            wanted: The same in words.

        Raises:
            DivergenceError: It is something else.
            LogEndedError: There is none.
        """
        found = self.log.next_tag()
        if found is None:
            raise LogEndedError(LogEnd.CUT)
        if found is Tag.END:
            self.log.skip_tag()
            raise LogEndedError(LogEnd(self.log.number()))
        if found is not tag:
            logged = "the step was over" if found in COMMANDS else _MEANINGS[found]
            raise DivergenceError(f"the replay asks for {wanted}, where in the log {logged}")
        self.log.skip_tag()
        return self.log

    def comes(self, tag: Tag) -> bool:
        """Whether the next entry is of a kind, and if so, go on to its content."""
        comes = self.log.next_tag() is tag
        if comes:
            self.log.skip_tag()
        return comes

    def take_command(self) -> Tag:
        """Go on to the content of the next command.

        Raises:
            DivergenceError: The log has more to tell of the command before.
            LogEndedError: There is none.
        """
        tag = self.log.next_tag()
        if tag is None:
            raise LogEndedError(LogEnd.CUT)
        if tag not in COMMANDS:
            raise DivergenceError(f"a step is over, in which {_MEANINGS[tag]} in the log")
        self.log.skip_tag()
        return tag
