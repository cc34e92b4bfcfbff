-- Let the leases of a dead or dying worker expire now, and take its heartbeat away; reap.lua does the rest.
-- keys: workers, unacked, leases
-- args: owner, the lifeline (lifeline.py) that was seen to be gone; '' when the owner itself gives up
-- returns: how many leases | nil, the worker has announced another lifeline or signed off: nothing is done
-- safe: a repeat finds no such heartbeat. Should the worker live after all, its next write or renewal finds
--       the lease taken or renews it. Reads all of `unacked`, which is fine for something this rare.
local owner, lifeline, count = ARGV[1], ARGV[2], 0
if lifeline ~= '' then
  local entry = redis.call('HGET', K.workers, owner)
  if not entry or cjson.decode(entry).lifeline ~= lifeline then
    return nil
  end
end
local all = redis.call('HGETALL', K.unacked)
for i = 1, #all, 2 do
  local head = read_unacked(all[i + 1])
  if owner_of(head[2]) == owner then
    redis.call('ZADD', K.leases, 'XX', NOW, all[i])
    count = count + 1
  end
end
redis.call('HDEL', K.workers, owner)
return count
