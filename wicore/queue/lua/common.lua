-- Shared by every script, put before it together with the key names K and the settings C (scripts.py).
-- Scripts run alone in Redis: no other command sees, and no crash leaves, half of one.

local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local TERMINAL = {succeeded = true, failed = true, cancelled = true, expired = true}
local STATUS = {done = 'succeeded', failed = 'failed', cancelled = 'cancelled', expired = 'expired'}
local DEAD_KEPT = 10000

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

-- Put a job under another status in the listings.
local function move(id, from, to, created_ms)
  if from then
    redis.call('ZREM', K.jobs_by_status[from], id)
  end
  redis.call('ZADD', K.jobs_by_status[to], created_ms, id)
end

-- Note that the job's message lies in `list` (the caller pushes it) and nobody works on it.
local function set_waiting(id, list)
  local record = record_of(id, 'status', 'created_ms', 'deadline_ms')
  redis.call('HDEL', K.job .. id, 'fence')
  redis.call('HSET', K.job .. id, 'status', 'queued', 'at', list)
  if record.status ~= 'queued' then
    move(id, record.status, 'queued', record.created_ms)
  end
  if record.deadline_ms then
    redis.call('ZADD', K.deadlines, record.deadline_ms, id)
  end
end

local function drop_lease(tag)
  redis.call('HDEL', K.unacked, tag)
  redis.call('ZREM', K.leases, tag)
end

-- Well-formed UTF-8 sequences, the Unicode Standard's table 3-7.
local UTF8 = {'[\194-\223][\128-\191]', '\224[\160-\191][\128-\191]', '[\225-\236\238\239][\128-\191][\128-\191]',
  '\237[\128-\159][\128-\191]', '\240[\144-\191][\128-\191][\128-\191]',
  '[\241-\243][\128-\191][\128-\191][\128-\191]', '\244[\128-\143][\128-\191][\128-\191]'}

-- Bytes as a text that JSON can hold: UTF-8 as it is, anything else byte by byte as Latin-1.
local function as_text(raw)
  local rest = raw
  for _, sequence in ipairs(UTF8) do
    rest = string.gsub(rest, sequence, ' ')
  end
  if not string.find(rest, '[\128-\255]') then
    return raw
  end
  return (string.gsub(raw, '[\128-\255]', function(c)
    local byte = string.byte(c)
    return string.char(192 + math.floor(byte / 64), 128 + byte % 64)
  end))
end

local function bury(raw, reason)
  local entry = {reason = reason, at_ms = NOW, message = as_text(raw)}
  redis.call('LPUSH', K.dead, cjson.encode(entry))
  redis.call('LTRIM', K.dead, 0, DEAD_KEPT - 1)
end

-- Milliseconds since 1970 as ISO 8601 in UTC; the date by Hinnant's civil_from_days.
local function iso(at_ms)
  local seconds = math.floor(at_ms / 1000)
  local days, rest = math.floor(seconds / 86400) + 719468, seconds % 86400
  local era = math.floor(days / 146097)
  local doe = days - era * 146097
  local yoe = math.floor(
    (doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03d+00:00', year, month,
    doy - math.floor((153 * mp + 2) / 5) + 1, math.floor(rest / 3600), math.floor(rest % 3600 / 60),
    rest % 60, at_ms % 1000)
end

-- What `AsyncResult(id).get()` returns or raises; `result` is JSON text.
local function store_celery_result(id, state, result)
  local name = K.celery_result .. id
  local meta = '{"status":"' .. state .. '","result":' .. result .. ',"traceback":null,"children":[],"date_done":"'
    .. iso(NOW) .. '","task_id":' .. cjson.encode(id) .. '}'
  redis.call('SET', name, meta, 'EX', C.retention_s)
  redis.call('PUBLISH', name, meta)
end

local function celery_exception(exc_type, message, module)
  return '{"exc_type":' .. cjson.encode(exc_type) .. ',"exc_message":[' .. cjson.encode(message)
    .. '],"exc_module":"' .. module .. '"}'
end

local function publish(id, seq, event)
  redis.call('XADD', K.log .. id, '0-' .. seq, 'event', event)
  redis.call('PUBLISH', K.events .. id, event)
end

-- Let record, log and listing entry go `retention_s` from now (the sweep in reap.lua does the listing).
local function start_retention(id)
  redis.call('EXPIRE', K.job .. id, C.retention_s)
  redis.call('EXPIRE', K.log .. id, C.retention_s)
  redis.call('ZADD', K.finished, NOW, id)
end

-- The one way a job ends. The caller has made sure that the record exists and is not terminal.
-- ending: type (done, failed, cancelled, expired); event (its JSON text), or else seq to make one;
-- optional JSON texts result, usage, error; finish_reason; exc_type and message of a failure; fence.
-- A job whose message still lies in a list becomes a tombstone: see schema.py.
local function terminate(id, ending)
  local job = K.job .. id
  local record = record_of(id, 'status', 'created_ms', 'at', 'seq', 'tag')
  local seq = tonumber(record.seq or '0') + 1
  local event = ending.event
  if not event then
    event = '{"job":' .. cjson.encode(id) .. ',"seq":' .. seq .. ',"type":"' .. ending.type .. '"'
      .. (ending.error and ',"error":' .. ending.error or '') .. '}'
  end
  publish(id, seq, event)
  local status = STATUS[ending.type]
  redis.call('HSET', job, 'status', status, 'finished_ms', ms(NOW), 'seq', seq)
  for _, name in ipairs({'result', 'usage', 'error', 'finish_reason'}) do
    if ending[name] then
      redis.call('HSET', job, name, ending[name])
    end
  end
  if ending.fence then
    redis.call('HSET', job, 'finished_by', ending.fence)
  end
  redis.call('HDEL', job, 'fence')
  move(id, record.status, status, record.created_ms)
  redis.call('ZREM', K.deadlines, id)
  redis.call('DEL', K.cancel .. id)
  if record.tag then
    drop_lease(record.tag)
    redis.call('HDEL', K.deliveries, record.tag)
  end
  if ending.type == 'done' then
    store_celery_result(id, 'SUCCESS', ending.result or 'null')
  elseif ending.type == 'cancelled' then
    store_celery_result(id, 'REVOKED', celery_exception('TaskRevokedError', 'revoked', 'celery.exceptions'))
  else
    store_celery_result(id, 'FAILURE', celery_exception(ending.exc_type, ending.message, 'wicore.errors'))
  end
  if record.at then
    redis.call('HINCRBY', K.tombstones, record.at, 1)
  else
    start_retention(id)
  end
end

local function error_body(message, kind, code)
  return '{"message":' .. cjson.encode(message) .. ',"type":"' .. kind .. '","code":"' .. code .. '","param":null}'
end

local function terminate_cancelled(id, fence)
  terminate(id, {type = 'cancelled', fence = fence,
    error = error_body('The job was cancelled.', 'invalid_request_error', 'cancelled')})
end

local function terminate_expired(id, fence)
  local message = 'The deadline passed before the job finished.'
  terminate(id, {type = 'expired', fence = fence, exc_type = 'Expired', message = message,
    error = error_body(message, 'timeout_error', 'expired')})
end

local function terminate_malformed(id, message)
  terminate(id, {type = 'failed', exc_type = 'InvalidRequest', message = message,
    error = error_body(message, 'invalid_request_error', 'invalid_request')})
end

-- A record for a message that came without one, of any client.
local function create_record(id, tag, level)
  redis.call('HSET', K.job .. id, 'status', 'queued', 'tag', tag, 'level', level, 'created_ms', ms(NOW), 'seq', 0)
  redis.call('ZADD', K.jobs, NOW, id)
  move(id, nil, 'queued', NOW)
end

local function is_job_id(id)
  return type(id) == 'string' and #id >= 1 and #id <= 128 and not string.find(id, '[^%w_.:%-]')
end

local function is_cancel_wished(id, record)
  return record.cancel or redis.call('EXISTS', K.cancel .. id) == 1
end

local function is_past_deadline(record)
  return record.deadline_ms and tonumber(record.deadline_ms) <= NOW
end

-- Messages in a list whose job can still run.
local function depth(list)
  local gone = tonumber(redis.call('HGET', K.tombstones, list) or '0')
  return math.max(0, redis.call('LLEN', list) - gone)
end

-- Give up the lease and put the raw message at the head or the tail of `list`.
local function requeue(id, tag, push, list, raw)
  drop_lease(tag)
  redis.call(push, list, raw)
  set_waiting(id, list)
end

-- A value of `unacked`: {queue, fence, id}, raw message.
local function read_unacked(value)
  local cut = string.find(value, '\n', 1, true)
  return cjson.decode(string.sub(value, 1, cut - 1)), string.sub(value, cut + 1)
end

-- Take a lease back as if it had never been given, to the head of the list that the message came from.
local function undo_lease(id, tag, value)
  local head, raw = read_unacked(value)
  redis.call('HSET', K.job .. id, 'attempts', redis.call('HINCRBY', K.deliveries, tag, -1))
  if is_cancel_wished(id, record_of(id, 'cancel')) then
    terminate_cancelled(id)
  else
    requeue(id, tag, 'RPUSH', head[1], raw)
  end
end
