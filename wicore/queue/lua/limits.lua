-- A client's rate limits. Put before every script, after line.lua.
-- Two token buckets, of requests and of tokens, each kept as the moment at which it is full again (the virtual
-- scheduling form of GCRA, ITU-T I.371): what is missing until then is the time left at the rate. A bucket never
-- written is full, and needs no key.
-- limits: {requests_per_minute, burst, tokens_per_minute, parallel}, each nil when there is none.

local MINUTE = 60000

-- What each bucket holds when it is full, and its rate; nil without such a limit.
local function bucket_of(limits, name)
  local per_minute = limits[name .. '_per_minute']
  return per_minute and (name == 'requests' and limits.burst or per_minute), per_minute
end

local function missing(client, name, per_minute)
  local full_at = tonumber(redis.call('HGET', K.bucket .. client, name) or '0')
  return math.max(0, full_at - NOW) * per_minute / MINUTE
end

-- Take from a bucket, or give back what is negative. It may come to hold less than nothing.
local function take(client, name, amount, per_minute)
  local bucket = K.bucket .. client
  local full_at = math.max(NOW, tonumber(redis.call('HGET', bucket, name) or '0')) + amount * MINUTE / per_minute
  redis.call('HSET', bucket, name, string.format('%.3f', full_at))
  local both = redis.call('HMGET', bucket, 'requests', 'tokens')
  local last = math.max(tonumber(both[1] or '0'), tonumber(both[2] or '0'))
  redis.call('PEXPIREAT', bucket, ms(math.ceil(last))) -- full is as good as gone
end

-- What each bucket holds now: {name, its size, what is left, ms until it is full}, ...
local function levels_of(client, limits)
  local levels = {}
  for _, name in ipairs({'requests', 'tokens'}) do
    local size, per_minute = bucket_of(limits, name)
    if size then
      local gone = missing(client, name, per_minute)
      levels[#levels + 1] = {name, size, math.floor(math.max(0, size - gone)), math.ceil(gone * MINUTE / per_minute)}
    end
  end
  return levels
end

-- Take one request and some tokens, and count one more job if it is one: all, or nothing.
-- returns: nothing, when it was all there | {'limited', what is short, its limit, ms until there is room, levels}
local function spend(client, limits, tokens, is_job)
  local function short(what, limit, wait)
    return {'limited', what, limit, math.ceil(wait), levels_of(client, limits)}
  end
  if is_job and limits.parallel then
    local open = redis.call('ZCARD', K.jobs_by_status.queued .. ':' .. client)
      + redis.call('ZCARD', K.jobs_by_status.running .. ':' .. client)
    if open >= limits.parallel then
      return short('parallel', limits.parallel, -1)
    end
  end
  local wanted = {requests = 1, tokens = tokens}
  for _, name in ipairs({'requests', 'tokens'}) do
    local size, per_minute = bucket_of(limits, name)
    -- What is more than a bucket holds may go when it is full, and leaves a debt.
    local excess = size and missing(client, name, per_minute) + math.min(wanted[name], size) - size
    if excess and excess > 0 then
      return short(name, per_minute, excess * MINUTE / per_minute)
    end
  end
  for name, amount in pairs(wanted) do
    local _, per_minute = bucket_of(limits, name)
    if per_minute then
      take(client, name, amount, per_minute)
    end
  end
end

-- A job has ended: what it took, instead of what was taken for it. Without usage it took nothing.
local function settle_rate(id, usage)
  local record = record_of(id, 'client', 'reserved', 'reserved_rate')
  if record.reserved then
    take(record.client, 'tokens', (usage and usage.total_tokens or 0) - record.reserved, record.reserved_rate)
  end
end
