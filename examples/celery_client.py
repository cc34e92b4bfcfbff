"""Text from any Celery application. Needs `pip install "celery[redis]"`, and nothing of WiCore.

REDIS_URL=redis://127.0.0.1:6379/0 python celery_client.py "Once upon a time" 40
"""

import os
import sys

from celery import Celery
from celery.exceptions import TaskRevokedError

URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

app = Celery("any-name", broker=URL, backend=URL)
app.conf.task_default_queue = "wicore"
app.conf.task_default_priority = 3  # 0 interactive, 3 normal, 6 batch, 9 background


def send(prompt, **fields):
    """Put a job on the queue; the fields are those of POST /v1/jobs."""
    job = {"kind": "completion", "prompt": prompt, **fields}
    return app.send_task("wicore.generate", kwargs=job, expires=600)


def main():
    prompt, max_tokens = sys.argv[1], int(sys.argv[2])
    answer = send(prompt, max_tokens=max_tokens, temperature=0).get(timeout=60)
    print(answer["choices"][0]["text"])

    try:
        send(prompt, temperature=9).get(timeout=60)
    except Exception as error:  # of a class made up on the spot, as wicore.errors is not installed here
        print(f"{type(error).__name__}: {error}", file=sys.stderr)

    too_long = send(prompt, ignore_eos=True, max_tokens=4000)
    app.control.revoke(too_long.id)
    try:
        too_long.get(timeout=60)
    except TaskRevokedError:
        print("revoked", file=sys.stderr)


if __name__ == "__main__":
    main()
