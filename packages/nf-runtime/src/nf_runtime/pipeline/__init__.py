"""The nano-batch pipeline: plans as data, compiled to schedules. Torch-free.

`plan` says what a plan is, `templates` makes those that ship, `division` cuts a batch, `compile`
turns a graph, a plan and a division into a `schedule`, `happens_before` checks one.
"""
