"""WiCore's Python client: submit jobs, follow them over any loss of the connection, cancel them.

    from wicore.client import Client

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit(prompt="Once upon a time", max_tokens=50)
        for text in job.stream():
            print(text, end="", flush=True)

`AsyncClient` is the same with `await`. It speaks HTTP and server-sent events, and needs httpx alone. Every
failure is a class of `wicore.errors`.
"""

from wicore.client.aio import AsyncClient, AsyncJob
from wicore.client.sync import Client, Job

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job"]
