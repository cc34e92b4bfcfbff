-- Take messages, the most urgent first, each under a lease; end those that must not run.
-- keys: the level lists, suspect, unacked, leases, deliveries, tombstones, deadlines, cancel:{id}, job:{id};
--       for jobs that end here, those of terminate (common.lua)
-- args: owner, how many, how many suspects at most (0 or 1), how many messages this owner took before
-- returns: for each {raw, tag, id, attempt, level, suspect 0|1, created ms, deadline ms | '', seq, now,
--       1 when the record was made here}
-- safe: a message is in a list or in `unacked`, never in neither; a lost answer leaves leases that
--       recover.lua finds or that expire. A message whose job has ended, that is no job, or that carries
--       the tag or id of another one is never leased.
local owner, wanted, suspects, taken = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local MAX_DROPPED = 1000 -- messages ended or dropped in one call: bounds the time others wait
local deliveries, dropped, empty = {}, 0, {}

-- id and tag of a message, or the id (if it can be read) and what is wrong.
local function identify(raw)
  local ok, message = pcall(cjson.decode, raw)
  if not ok or type(message) ~= 'table' then
    return nil, nil, 'not a JSON object'
  end
  local headers, properties = message.headers, message.properties
  local id = type(headers) == 'table' and headers.id
  local tag = type(properties) == 'table' and properties.delivery_tag
  if not is_job_id(id) then
    return nil, nil, 'headers.id: must be a string of 1 to 128 letters, digits, "_", ".", ":" or "-"'
  end
  if type(tag) ~= 'string' or tag == '' then
    return id, nil, 'properties.delivery_tag: must be a string'
  end
  return id, tag
end

-- Drop the message of a job that ended while it lay here.
local function drop_tombstone(id, list)
  if redis.call('HDEL', K.job .. id, 'at') == 1 then
    redis.call('HINCRBY', K.tombstones, list, -1)
    start_retention(id)
  end
end

local function reject(raw, id, tag, level, reason)
  bury(raw, reason)
  -- The sender waits for an answer under this id, unless it is another job's.
  if id and redis.call('EXISTS', K.job .. id) == 0 then
    create_record(id, tag or '', level)
    terminate_malformed(id, reason)
  end
end

local function lease(raw, id, tag, list, level, record, is_new)
  local attempt = redis.call('HINCRBY', K.deliveries, tag, 1)
  local fence = owner .. ':' .. attempt
  redis.call('HSET', K.unacked, tag, cjson.encode({list, fence, id}) .. '\n' .. raw)
  redis.call('ZADD', K.leases, NOW + C.lease_ms, tag)
  redis.call('HSET', K.job .. id, 'fence', fence, 'worker', owner, 'attempts', attempt)
  redis.call('HDEL', K.job .. id, 'at')
  redis.call('ZREM', K.deadlines, id)
  deliveries[#deliveries + 1] = {raw, tag, id, attempt, tonumber(level), list == K.suspect and 1 or 0,
    tonumber(record.created_ms or NOW), record.deadline_ms or '', tonumber(record.seq or '0'), NOW,
    is_new and 1 or 0}
end

-- Take one message from a list. Returns whether the list had one.
local function take(list)
  local raw = redis.call('RPOP', list)
  if not raw then
    redis.call('HDEL', K.tombstones, list)
    empty[list] = true
    return false
  end
  local id, tag, reason = identify(raw)
  local level = K.levels[list] or '3'
  dropped = dropped + 1
  if reason then
    reject(raw, id, tag, level, reason)
    return true
  end
  local record = record_of(id, 'status', 'tag', 'level', 'at', 'created_ms', 'deadline_ms', 'seq', 'cancel')
  local is_new = not record.status
  if redis.call('HEXISTS', K.unacked, tag) == 1 then
    reject(raw, id, '', level, 'properties.delivery_tag: a job that runs has the same')
  elseif TERMINAL[record.status] then
    if record.tag == tag then
      drop_tombstone(id, list)
    end
  elseif not is_new and record.tag ~= tag then
    bury(raw, 'headers.id: another job has the same')
  else
    if is_new then
      create_record(id, tag, level)
    end
    redis.call('HDEL', K.job .. id, 'at')
    if is_cancel_wished(id, record) then
      terminate_cancelled(id)
    elseif is_past_deadline(record) then
      terminate_expired(id)
    else
      lease(raw, id, tag, list, record.level or level, record, is_new)
      dropped = dropped - 1
    end
  end
  return true
end

-- Lists in the order in which the next message is looked for: a reserved share starts at the bottom.
local function order()
  local lists = {}
  if suspects > 0 then
    lists[1] = K.suspect
  end
  local backwards = C.background_every > 0 and (taken + #deliveries + 1) % C.background_every == 0
  for i = 1, #K.queues do
    lists[#lists + 1] = K.queues[backwards and #K.queues + 1 - i or i]
  end
  return lists
end

local found = true
while found and #deliveries < wanted and dropped < MAX_DROPPED do
  found = false
  for _, list in ipairs(order()) do
    local before = #deliveries
    if not empty[list] and take(list) then
      found = true
      if list == K.suspect and #deliveries > before then
        suspects = suspects - 1
      end
      break
    end
  end
end
return deliveries
