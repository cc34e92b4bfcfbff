-- Accept a job: its record, its place in the listings and its message, or nothing.
-- keys: job:{id}, idem:{digest}, jobs, jobs:queued, deadlines, the level's list; reads the lists' lengths
-- args: id, tag, list, raw message, level, timeout in ms or '', idempotency digest or '', body digest,
--       then field, value, ... of the record
-- returns: {'created' | 'existing', id, position, status} | {'conflict', id} | {'full', waiting}
-- safe: a repeat with the same tag (an answer lost on the way) finds its own record and says 'created';
--       a repeat with another tag says 'existing'. Neither pushes twice.
local id, tag, list, raw, level, timeout, key, digest = unpack(ARGV, 1, 8)

local function answer(known)
  local record = record_of(known, 'tag', 'position', 'status')
  return {record.tag == tag and 'created' or 'existing', known, tonumber(record.position or '0'), record.status}
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

local waiting, ahead = 0, depth(K.suspect)
for _, queue in ipairs(K.queues) do
  local length = depth(queue)
  waiting = waiting + length
  if tonumber(K.levels[queue]) <= tonumber(level) then
    ahead = ahead + length
  end
end
if waiting >= C.max_jobs then
  return {'full', waiting}
end

create_record(id, tag, level)
redis.call('HSET', K.job .. id, 'position', ahead, unpack(ARGV, 9))
if timeout ~= '' then
  redis.call('HSET', K.job .. id, 'deadline_ms', ms(NOW + tonumber(timeout)))
end
redis.call('LPUSH', list, raw)
set_waiting(id, list)
if key ~= '' then
  redis.call('SET', K.idempotency .. key, digest .. ' ' .. id, 'EX', 86400)
end
return {'created', id, ahead, 'queued'}
