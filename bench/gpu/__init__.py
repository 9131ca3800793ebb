"""What to do with half an hour on a GPU: four commands that keep what they found.

`make gpu-correctness`, `gpu-loop`, `gpu-figures` and `gpu-depth` are `python -m bench.gpu TARGET`:
lists of steps (targets.py), each a process with a time limit, run within a budget (session.py).
Every step's outcome is in the target's JSON as soon as it is known (record.py), so that a machine
that goes away takes nothing with it, and a later run goes on with what is missing, failed or stale.
`make gpu-rehearsal` runs all four without a GPU, as far as they go.
"""
