"""A model checker for the queue: every order of a few calls, up to a depth, on the real scripts.

    python -m tests.protocol --depth 8 [--world foreign]

Breadth first over states. A state is the database and what each worker believes it holds; two that differ
in times, random tags or the workers' names alone are one. From every new state each possible call is made:
sending, popping (also with the answer lost on the way), appending, renewing, ending and handing back with
every delivery that a worker ever got, also long after its lease went to another, the running out of a
lease or a deadline, the sweep, cancelling. Calls that may be repeated are. Then the rules are checked, and
that every job can still be brought to its end. A rule that breaks is reported with the shortest way there.
"""
