"""Other orders in which a schedule's lanes may come to their commands. Torch-free."""

from __future__ import annotations

from random import Random

from nf_runtime.pipeline.schedule import Code, Schedule


def random_order(schedule: Schedule, random: Random) -> list[tuple[int, Code, int]]:
    """Lane, code and argument of all commands, in an order that lanes of any speed could take.

    Operations that run one by one in such an order give what the lanes give, if the schedule makes
    them wait where they must. So a wait that is missing shows on a machine without lanes.

    Args:
        schedule: Whose commands.
        random: Chooses the lane that goes on.

    Raises:
        RuntimeError: The lanes wait for each other.
    """
    waiting = {lane: iter(commands.tolist()) for lane, commands in enumerate(schedule.commands)}
    heads = {lane: next(commands, None) for lane, commands in waiting.items()}
    signalled: set[int] = set()
    order: list[tuple[int, Code, int]] = []
    while any(head is not None for head in heads.values()):
        ready = [
            lane
            for lane, head in heads.items()
            if head is not None and not (head[0] == Code.WAIT and head[1] not in signalled)
        ]
        if not ready:
            raise RuntimeError("the lanes of the schedule wait for each other")
        lane = random.choice(ready)
        # A lane that is far ahead of the others shows more than lanes in step.
        for _ in range(random.choice((1, 1, 3, 1000))):
            head = heads[lane]
            if head is None or (head[0] == Code.WAIT and head[1] not in signalled):
                break
            code, argument = Code(head[0]), head[1]
            if code is Code.SIGNAL:
                signalled.add(argument)
            order.append((lane, code, argument))
            heads[lane] = next(waiting[lane], None)
    return order
