"""What `wicore doctor` looks at in a Redis of one's own, beyond its settings: sentinels, replicas, rights."""

from __future__ import annotations

from collections.abc import Iterator

import redis
from redis.exceptions import RedisError, ResponseError

from wicore.commands.check import Check
from wicore.queue.sentinel import Master, master_of


def check_setup(client: redis.Redis, wait_replicas: int) -> Iterator[Check]:
    """Raises redis.RedisError when the server stops answering."""
    master = master_of(client)
    if master is not None:
        yield check_sentinels(master)
    yield check_replicas(client, wait_replicas, behind_sentinel=master is not None)
    yield check_rights(client)


def check_sentinels(master: Master) -> Check:
    """Whether all sentinels answer, and enough of them know the master to agree on a failover."""
    away, doubts = [], []
    for (host, port), sentinel in master.sentinels():
        try:
            sentinel.sentinel_ckquorum(master.service_name)
        except ResponseError as err:
            doubts.append(f"{host}:{port}: {err}")
        except RedisError:
            away.append(f"{host}:{port}")
    if doubts:
        fix = "start the sentinels that are missing, and let each monitor this master"
        return Check("redis sentinels", "fail", "; ".join(doubts), fix)
    known = len(master.url.sentinels)
    if away:
        return Check(
            "redis sentinels",
            "warn",
            f"{len(away)} of {known} do not answer: {', '.join(away)}",
            "start them, or take them out of redis.url",
        )
    host, port = master.get_master_address()
    return Check("redis sentinels", "ok", f"all {known} answer; the master is {host}:{port}")


def check_replicas(client: redis.Redis, wanted: int, *, behind_sentinel: bool) -> Check:
    """Whether this is a master, and has the replicas that `redis.wait_replicas` asks for."""
    name = "redis replicas"
    info = client.info("replication")
    if info["role"] != "master":
        fix = "let redis.url name the master, or the sentinels that know it"
        return Check(name, "fail", "this server is a replica and takes no writes", fix)
    connected = int(info["connected_slaves"])
    detail = f"{connected} connected, redis.wait_replicas is {wanted}"
    if connected < wanted:
        fix = "connect more replicas or lower redis.wait_replicas; until then every new job is a 503"
        return Check(name, "fail", detail, fix)
    if behind_sentinel and not wanted:
        fix = "set redis.wait_replicas to 1, so that a failover loses no accepted job"
        return Check(name, "warn", detail, fix)
    return Check(name, "ok", detail)


def check_rights(client: redis.Redis) -> Check:
    """Whether workers may look for the lifelines of others (wicore/queue/lifeline.py)."""
    name = "redis rights"
    try:
        client.client_list(client_id=[client.client_id()])
        client.info("server")
    except ResponseError as err:
        fix = (
            "ACL SETUSER name +info +client|id +client|list +client|setname, "
            "so that a dead worker is noticed in seconds and not when its leases end"
        )
        return Check(name, "warn", str(err), fix)
    return Check(name, "ok", "CLIENT and INFO are permitted")
