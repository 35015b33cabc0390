"""What can go wrong in normal operation."""


class OutOfPages(RuntimeError):
    """There are fewer free pages than were asked for. Nothing has changed; release a sequence."""
