"""Text over plain Redis, token by token. Needs `pip install redis`, and nothing of WiCore.

export REDIS_URL=redis://127.0.0.1:6379/0
python redis_client.py "Once upon a time" 40      prints the job's id, then its text
python redis_client.py --resume JOB 12            the text after event 12
"""

import json
import os
import sys
import time
import uuid

import redis

QUEUES = {"interactive": "wicore", "normal": "wicore\x06\x163", "batch": "wicore\x06\x166"}
LAST = {"done", "failed", "cancelled", "expired"}


def submit(client, body, level="normal"):
    """Push a job; returns its id. Pushing the same message twice runs it once."""
    job = str(uuid.uuid4())
    message = {
        "headers": {"task": "wicore.generate", "id": job, "expires": None},
        "properties": {"delivery_tag": str(uuid.uuid4())},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "body": json.dumps([[], body, {}]),
    }
    client.lpush(QUEUES[level], json.dumps(message))
    return job


def follow(client, job, after=0):
    """Every event numbered over `after`, once and in order, to the last one, whatever connections break."""
    while True:
        try:
            for event in attend(client, job, after):
                if event["seq"] > after + 1:
                    break  # something was missed: the log has it
                if event["seq"] == after + 1:
                    after = event["seq"]
                    yield event
                    if event["type"] in LAST:
                        return
        except (redis.ConnectionError, redis.TimeoutError):
            time.sleep(0.5)


def attend(client, job, after):
    """What the log has, then what is published, until that cannot be trusted to be everything."""
    with client.pubsub() as channel:
        channel.subscribe(f"wicore:events:{job}")
        channel.get_message(timeout=None)  # the confirmation: from here on nothing new is missed
        for _, fields in client.xrange(f"wicore:log:{job}", f"(0-{after}", "+"):
            yield json.loads(fields[b"event"])
        while (message := channel.get_message(timeout=5)) is not None:
            if message["type"] == "subscribe":
                return  # redis-py connected anew
            yield json.loads(message["data"])


def result(client, job):
    """The answer in OpenAI's form, once the last event has come."""
    outcome = json.loads(client.get(f"celery-task-meta-{job}"))
    if outcome["status"] != "SUCCESS":
        raise RuntimeError(outcome["result"]["exc_message"])
    return outcome["result"]


def main():
    client = redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"))
    if sys.argv[1] == "--resume":
        job, after = sys.argv[2], int(sys.argv[3])
    else:
        body = {"kind": "completion", "prompt": sys.argv[1], "max_tokens": int(sys.argv[2]), "temperature": 0}
        job, after = submit(client, body), 0
        print(job, file=sys.stderr, flush=True)
    for event in follow(client, job, after):
        if event["type"] == "token":
            print(event["text"], end="", flush=True)
    print()
    print(result(client, job)["usage"], file=sys.stderr)
    client.close()


if __name__ == "__main__":
    main()
