"""Valkey servers to get into trouble: one alone, or a master, its replica and three sentinels."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import redis

from tests.waiting import free_port, until
from wicore.queue.embedded import _server_binary

MASTER = "wicore-test"
PATIENCE_S = 20.0


class Server:
    """One Valkey process, as data server or as sentinel."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.folder = folder
        folder.mkdir()
        self._command = [str(_server_binary()), *options, "--port", str(self.port), "--dir", str(folder)]
        self._command += ["--bind", "127.0.0.1"]
        self.client = redis.Redis(port=self.port, socket_timeout=5, protocol=2, retry=None)
        self.start()

    def start(self) -> None:
        self.launch()
        until(self.client.ping, "a server started")

    def launch(self, *options: str) -> None:
        """Start it again, with more options, and do not wait until it answers."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([*self._command, *options], stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.client.close()


class Group:
    """A context manager: `url` is what `connect` takes; `kill_master` and `promoted` make a failover."""

    def __enter__(self) -> Group:
        self.folder = Path(tempfile.mkdtemp(prefix="wicore-"))
        self.servers: list[Server] = []
        try:
            self.master = self._server("master")
            self.replica = self._server("replica", "--replicaof", f"127.0.0.1 {self.master.port}")
            until(self._is_in_sync, "the replica followed its master")
            ports = [free_port() for _ in range(3)]
            self.sentinels = [self._sentinel(port, ports) for port in ports]
            until(self._are_ready, "the sentinels saw each other and the replica")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.close()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        return f"sentinel://{','.join(f'127.0.0.1:{s.port}' for s in self.sentinels)}/{MASTER}"

    def promoted(self) -> bool:
        """Whether the replica has become the master."""
        return self.replica.client.role()[0] == b"master"

    def _server(self, name: str, *options: str) -> Server:
        more = ("--appendonly", "no", "--save", "", "--repl-diskless-sync-delay", "0")
        self.servers.append(Server(self.folder / name, *options, *more))
        return self.servers[-1]

    def _sentinel(self, port: int, ports: list[int]) -> Server:
        """Told of the others and the replica: to find them out takes sentinels seconds."""
        path = self.folder / f"sentinel{port}.conf"
        lines = [
            f"myid {port:040x}",
            f"monitor {MASTER} 127.0.0.1 {self.master.port} 2",
            f"down-after-milliseconds {MASTER} 500",
            f"failover-timeout {MASTER} 4000",
            f"known-replica {MASTER} 127.0.0.1 {self.replica.port}",
            *(f"known-sentinel {MASTER} 127.0.0.1 {other} {other:040x}" for other in ports if other != port),
        ]
        path.write_text("".join(f"sentinel {line}\n" for line in lines))
        self.servers.append(Server(self.folder / f"sentinel{port}", str(path), "--sentinel", port=port))
        return self.servers[-1]

    def _is_in_sync(self) -> bool:
        return self.replica.client.info("replication")["master_link_status"] == "up"

    def _are_ready(self) -> bool:
        replicas = [sentinel.client.sentinel_slaves(MASTER) for sentinel in self.sentinels]
        return all(replica["master-link-status"] == "ok" for (replica,) in replicas)
