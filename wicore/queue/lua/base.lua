-- Put before every script, after the key names K and the settings C (scripts.py); line, limits and common follow.
-- Scripts run alone in Redis: no other command sees, and no crash leaves, half of one.

local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local TERMINAL = {succeeded = true, failed = true, cancelled = true, expired = true}
local STATUS = {done = 'succeeded', failed = 'failed', cancelled = 'cancelled', expired = 'expired'}

-- Of what passed through since the server has its data; for the metrics alone.
local function count(what)
  redis.call('HINCRBY', K.counts, what, 1)
end

local function ms(number)
  return string.format('%d', number)
end

-- Fields of a record by name; absent ones are nil.
local function record_of(id, ...)
  local values = redis.call('HMGET', K.job .. id, ...)
  local record = {}
  for i, name in ipairs({...}) do
    record[name] = values[i] or nil
  end
  return record
end

local function owner_of(fence)
  return string.match(fence, '^(.*):%d+$')
end

-- A value of `unacked`: {the list it was taken from, fence, id}, raw message.
local function read_unacked(value)
  local cut = string.find(value, '\n', 1, true)
  return cjson.decode(string.sub(value, 1, cut - 1)), string.sub(value, cut + 1)
end

-- Put a job under another status in the listings: that of all, and that of its client if it has a name.
local function move(id, from, to, created_ms)
  local client = redis.call('HGET', K.job .. id, 'client')
  local own = client and client ~= '' and ':' .. client
  for _, suffix in ipairs({'', own or nil}) do
    if from then
      redis.call('ZREM', K.jobs_by_status[from] .. suffix, id)
    end
    redis.call('ZADD', K.jobs_by_status[to] .. suffix, created_ms, id)
  end
end

-- `fence` is `owner:n`; the owner's trial (is_blamed, reap.lua) is over when its suspect's lease is.
local function drop_lease(tag, fence)
  redis.call('HDEL', K.unacked, tag)
  redis.call('ZREM', K.leases, tag)
  local trial = K.trial .. owner_of(fence)
  if redis.call('GET', trial) == tag then
    redis.call('DEL', trial)
  end
end

-- A started job has until its deadline; one that never started, until the sooner of that and `start_by`.
local function due(record)
  local start_by = not record.started_ms and record.start_by_ms
  return math.min(tonumber(record.deadline_ms or '') or math.huge, tonumber(start_by or '') or math.huge)
end

local function is_late(id)
  return due(record_of(id, 'deadline_ms', 'start_by_ms', 'started_ms')) <= NOW
end
