-- Take jobs, the most urgent first and clients in turn, each under a lease; end those that must not run.
-- First gives the messages that other clients pushed on the level lists a record and a place in the line.
-- keys: the level lists, suspect, unacked, leases, deliveries, cancel:{id}, job:{id}, message:{id}, trial:{owner},
--       those of the line (line.lua) and, for jobs that end here, of terminate (common.lua)
-- args: owner, how many, how many suspects at most (0 or 1), how many jobs this owner took before,
--       the level above which to look: 10 for all
-- returns: for each {raw, tag, id, attempt, level, suspect 0|1, created ms, deadline ms | '', seq, now,
--       fence, 1 when nobody has read the body yet}
-- safe: a message is on a level list, in message:{id} or in `unacked`, never in none and never in two; a lost
--       answer leaves leases that recover.lua finds or that expire. A message whose job has ended, that is no
--       job, or that carries the tag or id of another one is never leased.
local owner, wanted, suspects = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local taken, above = tonumber(ARGV[4]), tonumber(ARGV[5])
local MOST = 1000 -- messages sorted, ended or dropped in one call: bounds the time others wait
local SUSPECTS_SEEN = 100
local deliveries, handled = {}, 0

-- What a message says of itself, or the id (if it can be read) and what is wrong.
local function identify(raw)
  local ok, message = pcall(cjson.decode, raw)
  if not ok or type(message) ~= 'table' then
    return {fault = 'not a JSON object'}
  end
  local headers = type(message.headers) == 'table' and message.headers or {}
  local properties = type(message.properties) == 'table' and message.properties or {}
  local id, tag, client = headers.id, properties.delivery_tag, headers.client
  if not is_job_id(id) then
    return {fault = 'headers.id: must be a string of 1 to 128 letters, digits, "_", ".", ":" or "-"'}
  end
  if type(tag) ~= 'string' or tag == '' then
    return {id = id, fault = 'properties.delivery_tag: must be a string'}
  end
  if client == nil or client == cjson.null then
    client = ''
  elseif not is_job_id(client) then
    return {id = id, fault = 'headers.client: must be a string of 1 to 128 letters, digits, "_", ".", ":" or "-"'}
  end
  return {id = id, tag = tag, client = client}
end

local function reject(raw, id, level, reason)
  bury(raw, reason, id, level)
  -- The sender waits for an answer under this id, unless it is another job's.
  if id and redis.call('EXISTS', K.job .. id) == 0 then
    create_record(id, '', level, '', 0)
    terminate_malformed(id, reason)
  end
end

local function sort(level)
  while handled < MOST do
    local raw = redis.call('RPOP', K.lists[level])
    if not raw then
      return
    end
    if raw ~= C.bell then
      handled = handled + 1
      local message = identify(raw)
      local known = message.id and redis.call('HGET', K.job .. message.id, 'tag')
      if message.fault then
        reject(raw, message.id, level, message.fault)
      elseif not known and redis.call('HEXISTS', K.deliveries, message.tag) == 1 then
        reject(raw, message.id, level, 'properties.delivery_tag: another open job has the same')
      elseif not known then
        create_record(message.id, message.tag, level, message.client, guessed_tokens(raw))
        redis.call('HSET', K.job .. message.id, 'unread', 1)
        join_line(message.id, raw, false)
      elseif known ~= message.tag then
        bury(raw, 'headers.id: another job has the same', message.id, level, message.client)
      end -- else the same message came twice
    end
  end
end

local function lease(id, record, from)
  local tag, raw = record.tag, redis.call('GETDEL', K.message .. id)
  leave_line(id)
  local attempt = redis.call('HINCRBY', K.deliveries, tag, 1)
  local fence = owner .. ':' .. redis.call('HINCRBY', K.job .. id, 'leases', 1)
  redis.call('HSET', K.unacked, tag, cjson.encode({from, fence, id}) .. '\n' .. raw)
  redis.call('ZADD', K.leases, NOW + C.lease_ms, tag)
  redis.call('HSET', K.job .. id, 'fence', fence, 'worker', owner, 'attempts', attempt, 'leased_ms', ms(NOW))
  charge(id, record.tokens)
  count('leased')
  if from == K.suspect then
    redis.call('SET', K.trial .. owner, tag)
    suspects = suspects - 1
  end
  deliveries[#deliveries + 1] = {raw, tag, id, attempt, tonumber(record.level), from == K.suspect and 1 or 0,
    tonumber(record.created_ms), record.deadline_ms or '', tonumber(record.seq), NOW, fence,
    record.unread and 1 or 0}
end

-- Take a job out of a queue, if its id still means one that waits there.
local function take(id, from)
  local record = record_of(id, 'at', 'tag', 'level', 'client', 'tokens', 'created_ms', 'deadline_ms', 'seq', 'cancel',
    'unread')
  handled = handled + 1
  if record.at ~= from then
    return
  end
  if is_cancel_wished(id, record) then
    terminate_cancelled(id)
  elseif is_late(id) then
    terminate_expired(id)
  else
    local turn = redis.call('ZSCORE', K.clients .. record.level, record.client)
    if turn and from ~= K.suspect then
      redis.call('HSET', K.turns, record.level, turn)
    end
    lease(id, record, from)
  end
end

-- Take one from a level; false when nothing waits there.
local function serve(level)
  sort(level)
  local client = next_client(level)
  if not client then
    return false
  end
  local list = queue_of(level, client)
  take(redis.call('RPOP', list), list)
  return true
end

-- Levels in the order in which the next job is looked for: a reserved share starts at the bottom.
local function order()
  local backwards = above == 10 and C.background_every > 0 and (taken + #deliveries + 1) % C.background_every == 0
  local levels = {}
  for i = 1, #K.levels do
    local level = K.levels[backwards and #K.levels + 1 - i or i]
    if tonumber(level) < above then
      levels[#levels + 1] = level
    end
  end
  return levels
end

-- The most urgent suspect, the oldest of those; ids that mean nothing any more come first, to be dropped.
local function next_suspect()
  local best, urgency
  local ids = redis.call('LRANGE', K.suspect, -SUSPECTS_SEEN, -1)
  for i = #ids, 1, -1 do
    local record = record_of(ids[i], 'at', 'level')
    local level = record.at == K.suspect and tonumber(record.level) or -1
    if not best or level < urgency then
      best, urgency = ids[i], level
    end
  end
  if best then
    redis.call('LREM', K.suspect, -1, best)
  end
  return best
end

local function take_any()
  local suspect = suspects > 0 and next_suspect()
  if suspect then
    take(suspect, K.suspect)
    return true
  end
  for _, level in ipairs(order()) do
    if serve(level) then
      return true
    end
  end
  return false
end

while #deliveries < wanted and handled < MOST and take_any() do
end
-- Workers that wait for a push shall hear of what this one leaves.
for _, level in ipairs(K.levels) do
  if next_client(level) then
    ring(level)
  end
end
return deliveries
