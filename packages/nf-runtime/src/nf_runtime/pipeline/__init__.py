"""The nano-batch pipeline: plans as data, compiled to schedules. Torch-free.

`plan` says what a plan is, `templates` makes those that ship, `division` cuts a batch, `workspace`
says where activations are, `compiler` turns all that into a `schedule`, `happens_before` checks it.
"""
