-- The sweep: leases of dead workers, waiting jobs past their time, records past their retention.
-- keys: leases, unacked, deliveries, suspect, trial:{owner}, dead, deadlines, finished, jobs, jobs:*, job:{id};
--       for jobs that end here, those of terminate (common.lua)
-- args: none
-- returns: {jobs made suspect, jobs ended}
-- safe: any worker may call it at any time; each lease is taken once, and with it goes its fence, so that
--       the former holder can write nothing more.
local BATCH = 100
local suspects, ended = 0, 0

local function give_up(id, raw, attempts, record)
  local message = 'The worker died or hung in each of ' .. attempts .. ' attempts.'
  bury(raw, message, id, record.level, record.client)
  terminate(id, {type = 'failed', exc_type = 'WorkerLost', message = message,
    error = error_body(message, 'server_error', 'worker_lost')})
end

-- Whether the attempt counts. A worker that ran a suspect died of that one, not of the jobs beside it, which
-- become suspects uncharged. The suspect may be reaped first: its mark outlasts it by two leases.
local function is_blamed(tag, owner, from)
  local trial = redis.call('GET', K.trial .. owner)
  if from == K.suspect and trial == tag then
    redis.call('SET', K.trial .. owner, '', 'PX', 2 * C.lease_ms)
    return true
  end
  return not trial
end

local function reap(tag, value)
  local head, raw = read_unacked(value)
  local from, fence, id = unpack(head)
  local blamed = is_blamed(tag, owner_of(fence), from)
  local attempts = redis.call('HINCRBY', K.deliveries, tag, blamed and 0 or -1)
  redis.call('HSET', K.job .. id, 'attempts', attempts)
  local record = record_of(id, 'cancel', 'level', 'client')
  if is_cancel_wished(id, record) then
    terminate_cancelled(id)
  elseif is_late(id) then
    terminate_expired(id)
  elseif blamed and attempts >= C.max_attempts then
    give_up(id, raw, attempts, record)
  else
    give_up_lease(id, tag, fence)
    join_suspects(id, raw)
    count('redelivered')
    suspects = suspects + 1
    return
  end
  ended = ended + 1
end

for _, tag in ipairs(redis.call('ZRANGEBYSCORE', K.leases, '-inf', NOW, 'LIMIT', 0, BATCH)) do
  local value = redis.call('HGET', K.unacked, tag)
  if value then
    reap(tag, value)
  else
    redis.call('ZREM', K.leases, tag) -- only someone else's hand can have done this
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.deadlines, '-inf', NOW, 'LIMIT', 0, BATCH)) do
  terminate_expired(id)
  ended = ended + 1
end

local forgotten = NOW - C.retention_s * 1000
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', K.finished, '-inf', forgotten, 'LIMIT', 0, BATCH)) do
  unlist(string.match(entry, '^(%S+) ?(.*)$'))
end
return {suspects, ended}
