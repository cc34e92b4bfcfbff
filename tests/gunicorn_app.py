"""What the process tests let gunicorn load: the real app over the queue in memory.

The prompt is the script: each word is a token; `wait` holds the job until it is cancelled.
"""

from __future__ import annotations

from fake_backend import FakeBackend, FakeJob

from api import create_app
from api.services import ServedModel, Services
from api.slots import Slots
from wicore.config import load_settings


def play(backend: FakeBackend, job: FakeJob) -> None:
    words = str(job.body.prompt or (job.body.messages or [])[-1].text()).split(" ")
    for word in words:
        if word == "wait":
            with backend.changed:
                backend.changed.wait_for(lambda: job.id in backend.cancelled, 60)
            return backend.finish(job, "cancelled") if job.status == "running" else None
        if word.startswith("flood"):
            backend.emit(job, ["x" * 1000] * int(word.removeprefix("flood")))
        else:
            backend.emit(job, [word + " "])
    return backend.finish(job)


settings = load_settings()
backend = FakeBackend(play)
app = create_app(
    settings,
    Services(
        settings,
        ServedModel("tiny", 1_700_000_000, 1000),
        backend,
        backend,
        lambda body: 3,
        lambda text: [1],
        lambda: ["w1"],
        Slots(settings.api.max_sockets),
    ),
)


@app.get("/test/job-of/<user>")
def job_of(user: str) -> dict[str, str | None]:
    """Lets a test find the job of a call that it cannot get an answer from."""
    ids = [job.id for job in list(backend.jobs.values()) if job.body.user == user and job.events]
    return {"id": ids[0] if ids else None}
