"""The chaos suite: the whole service in real processes, thousands of jobs, and everything but a disk failing.

`python -m tests.chaos` or `make chaos`; docs/operation.md says what it does and what it asserts.

    jobs.py        what is asked for: kinds of jobs, tickets, messages that are none
    wire.py        the least of HTTP, server-sent events, websocket and Redis clients
    transcript.py  what a client was told about a job, checked as it comes
    doors.py       clients: submit, follow, leave, come back, cancel
    fleet.py       the processes: Valkey, workers, APIs
    worker.py      the worker process, with an engine that poison kills
    faults.py      what goes wrong
    breaks.py      the product with a guarantee taken out, to show that the suite can fail
    verdict.py     what must hold at the end
    harness.py     one run
"""
