-- Accept a job: its record, its place in the listings and in its client's queue, or nothing.
-- keys: job:{id}, message:{id}, idem:{digest}, jobs, jobs:queued, bucket:{client}, and those of the line (line.lua)
-- args: id, tag, raw message, level, client, prompt tokens, most output tokens, timeout in ms or '',
--       longest wait in ms or '', idempotency digest or '', body digest, limits of the client as JSON or '',
--       tokens to take from its bucket until the job's end settles it, then field, value, ... of the record
-- returns: {'created' | 'existing', id, position, status, estimated wait in ms or -1, levels} | {'conflict', id}
--       | {'full', 'jobs' | 'tokens', how many are waiting, ms until there is room or -1} | {'limited', ...} and
--       levels as limits.lua gives them
-- safe: a repeat with the same tag (an answer lost on the way) finds its own record and says 'created';
--       a repeat with another tag says 'existing'. Neither adds twice.
local id, tag, raw, level, client, prompt, output, timeout, longest_wait, key, digest = unpack(ARGV, 1, 11)
local limits, reserved = ARGV[12] ~= '' and cjson.decode(ARGV[12]), tonumber(ARGV[13])

local function answer(known)
  local record = record_of(known, 'tag', 'position', 'status', 'wait_ms')
  -- Changes nothing, but is a write: who then waits for replicas waits for the first one's writes, too.
  redis.call('HSET', K.job .. known, 'tag', record.tag)
  return {record.tag == tag and 'created' or 'existing', known, tonumber(record.position or '0'), record.status,
    tonumber(record.wait_ms or '-1'), {}}
end

if key ~= '' then
  local bound = redis.call('GET', K.idempotency .. key)
  if bound then
    local cut = string.find(bound, ' ', 1, true)
    local known = string.sub(bound, cut + 1)
    if redis.call('EXISTS', K.job .. known) == 1 then
      if string.sub(bound, 1, cut - 1) ~= digest then
        return {'conflict', known}
      end
      return answer(known)
    end
  end
end
if redis.call('EXISTS', K.job .. id) == 1 then
  return answer(id)
end

local tokens = expected_tokens(tonumber(prompt), tonumber(output))
local jobs_waiting, tokens_waiting = waiting(level)
local function full(what, count, excess)
  return {'full', what, count, math.ceil(wait_after(0, excess) or -1)}
end
if jobs_waiting >= C.max_jobs then
  return full('jobs', jobs_waiting, 0)
end
-- A job over the bound by itself may wait alone.
if tokens_waiting > 0 and tokens_waiting + tokens > C.max_tokens then
  return full('tokens', tokens_waiting, tokens_waiting + tokens - C.max_tokens)
end

local refusal = limits and spend(client, limits, reserved, true)
if refusal then
  return refusal
end

local jobs_ahead, tokens_ahead = ahead_of(level, client)
local wait = math.ceil(wait_after(jobs_ahead, tokens_ahead) or -1)
create_record(id, tag, level, client, tokens)
redis.call('HSET', K.job .. id, 'position', jobs_ahead, 'wait_ms', wait, unpack(ARGV, 14))
if limits and limits.tokens_per_minute then
  redis.call('HSET', K.job .. id, 'reserved', reserved, 'reserved_rate', limits.tokens_per_minute)
end
if timeout ~= '' then
  redis.call('HSET', K.job .. id, 'deadline_ms', ms(NOW + tonumber(timeout)))
end
if longest_wait ~= '' then
  redis.call('HSET', K.job .. id, 'start_by_ms', ms(NOW + tonumber(longest_wait)))
end
join_line(id, raw, false)
if key ~= '' then
  redis.call('SET', K.idempotency .. key, digest .. ' ' .. id, 'EX', 86400)
end
return {'created', id, jobs_ahead, 'queued', wait, limits and levels_of(client, limits) or {}}
