"""The fault suite: ranks are killed, stopped, starved and fed broken files, and must end as if nothing had happened.

`PYTHONPATH=.:tests python -m faults [PART ...] --seed N` from the repository's root. Every case
ends in the same check (same.py): final weights, moments, schedule, data position, random state and ledger are bitwise
those of an undisturbed run of the same layout. Nothing is tried twice.

inject.py makes a fault happen inside a rank, ranks.py starts ranks, cells.py lists the matrix and plays the scheduler
that starts a run again; launchers.py, inputs.py, worlds.py, planted.py and soak.py are the other parts, table.py the
figures.
"""
