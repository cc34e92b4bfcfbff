-- Put before every script, after limits.lua: how jobs begin and end.

local DEAD_KEPT = 10000
local TASKS_KEPT = 1000

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

-- Give a message up. `job`: its id, nil when that cannot be read. The message comes last in the entry, after
-- DEAD_MESSAGE, which no JSON string can hold: so the rest can be read without it (dead_list.lua).
local DEAD_MESSAGE = ',"message":'
local function bury(raw, reason, job, level, client)
  local number = redis.call('INCR', K.dead_count)
  local entry = '{"id":"' .. ms(NOW) .. '-' .. ms(number) .. '","at_ms":' .. ms(NOW)
    .. ',"job":' .. cjson.encode(job or cjson.null) .. ',"level":' .. level
    .. ',"client":' .. cjson.encode(client or '') .. ',"reason":' .. cjson.encode(reason)
    .. DEAD_MESSAGE .. cjson.encode(as_text(raw)) .. '}'
  redis.call('LPUSH', K.dead, entry)
  redis.call('LTRIM', K.dead, 0, DEAD_KEPT - 1)
end

-- Index in the dead list of the first entry numbered under `number`; the numbers fall along the list.
local function dead_below(number)
  local low, high = 0, redis.call('LLEN', K.dead)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local found = string.match(redis.call('LINDEX', K.dead, middle), '^{"id":"%d+%-(%d+)"')
    if tonumber(found) < number then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

-- The entry with this id, or nil.
local function dead_entry(id)
  local number = tonumber(string.match(id, '^%d+%-(%d+)$'))
  local entry = number and redis.call('LINDEX', K.dead, dead_below(number + 1))
  local start = '{"id":"' .. id .. '",'
  return entry and string.sub(entry, 1, #start) == start and entry or nil
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

-- Let record, log and listing entry go `retention_s` from now (the sweep in reap.lua does the listing). A line of
-- an open batch is handed to its collector instead, who starts it (batch_line.lua).
local function start_retention(id)
  local batch = redis.call('HGET', K.job .. id, 'batch')
  if batch and redis.call('SISMEMBER', K.batches_open, batch) == 1 then
    redis.call('RPUSH', K.batch .. batch .. ':ended', id)
    return
  end
  redis.call('EXPIRE', K.job .. id, C.retention_s)
  redis.call('EXPIRE', K.log .. id, C.retention_s)
  local client = redis.call('HGET', K.job .. id, 'client')
  redis.call('ZADD', K.finished, NOW, client == '' and id or id .. ' ' .. client)
end

-- Take an ended job off the listings.
local function unlist(id, client)
  redis.call('ZREM', K.finished, client == '' and id or id .. ' ' .. client)
  redis.call('ZREM', K.jobs, id)
  redis.call('ZREM', K.jobs_of_all .. client, id)
  for status in pairs(TERMINAL) do
    redis.call('ZREM', K.jobs_by_status[status], id)
    redis.call('ZREM', K.jobs_by_status[status] .. ':' .. client, id)
  end
end

-- Owe the webhook of a job that ends now. The entry is what counts; the Celery message makes it prompt. It may
-- be lost, or left out when nobody takes them: the sweep sends another (workers/tasks.py).
local function owe_webhook(id)
  redis.call('ZADD', K.webhooks, NOW, id)
  redis.call('HSET', K.job .. id, 'webhook_status', 'pending')
  if redis.call('LLEN', K.tasks) >= TASKS_KEPT then
    return
  end
  local name, tag = cjson.encode(id), cjson.encode('webhook-' .. id)
  redis.call('LPUSH', K.tasks, '{"body":' .. cjson.encode('[[' .. name .. '],{},{}]')
    .. ',"content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"lua","task":"'
    .. C.webhook_task .. '","id":' .. tag .. ',"root_id":' .. tag .. ',"parent_id":null,"group":null,"retries":0,'
    .. '"eta":null,"expires":null},"properties":{"correlation_id":' .. tag .. ',"reply_to":"","delivery_mode":2,'
    .. '"delivery_info":{"exchange":"","routing_key":"' .. K.tasks .. '"},"priority":0,"delivery_tag":' .. tag .. '}}')
end

-- The one way a job ends. The caller has made sure that the record exists and is not terminal.
-- ending: type (done, failed, cancelled, expired); event (its JSON text), or else seq to make one;
-- optional JSON texts result, usage, error; finish_reason; exc_type and message of a failure; fence.
local function terminate(id, ending)
  local job = K.job .. id
  local record = record_of(id, 'status', 'created_ms', 'seq', 'tag', 'fence', 'webhook_url')
  local seq = tonumber(record.seq or '0') + 1
  local event = ending.event
  if not event then
    event = '{"job":' .. cjson.encode(id) .. ',"seq":' .. seq .. ',"type":"' .. ending.type .. '"'
      .. (ending.error and ',"error":' .. ending.error or '') .. '}'
  end
  publish(id, seq, event)
  local status = STATUS[ending.type]
  count(status)
  redis.call('HSET', job, 'status', status, 'finished_ms', ms(NOW), 'seq', seq)
  for _, name in ipairs({'result', 'usage', 'error', 'finish_reason'}) do
    if ending[name] then
      redis.call('HSET', job, name, ending[name])
    end
  end
  if ending.fence then
    redis.call('HSET', job, 'finished_by', ending.fence)
  end
  local usage = ending.usage and cjson.decode(ending.usage)
  settle_rate(id, usage)
  if record.fence then
    settle(id, ending.type, usage)
    drop_lease(record.tag, record.fence)
    redis.call('HDEL', job, 'fence')
  else
    leave_line(id)
    redis.call('DEL', K.message .. id)
  end
  move(id, record.status, status, record.created_ms)
  redis.call('DEL', K.cancel .. id)
  if record.tag then
    redis.call('HDEL', K.deliveries, record.tag)
  end
  if ending.type == 'done' then
    store_celery_result(id, 'SUCCESS', ending.result or 'null')
  elseif ending.type == 'cancelled' then
    store_celery_result(id, 'REVOKED', celery_exception('TaskRevokedError', 'revoked', 'celery.exceptions'))
  else
    store_celery_result(id, 'FAILURE', celery_exception(ending.exc_type, ending.message, 'wicore.errors'))
  end
  if record.webhook_url then
    owe_webhook(id)
  end
  start_retention(id)
end

local function error_body(message, kind, code)
  return '{"message":' .. cjson.encode(message) .. ',"type":"' .. kind .. '","code":"' .. code .. '","param":null}'
end

local function terminate_cancelled(id, fence)
  terminate(id, {type = 'cancelled', fence = fence,
    error = error_body('The job was cancelled.', 'invalid_request_error', 'cancelled')})
end

local function terminate_expired(id, fence)
  local started = redis.call('HEXISTS', K.job .. id, 'started_ms') == 1
  local message = started and 'The deadline passed before the job finished.' or 'The job was not started in time.'
  terminate(id, {type = 'expired', fence = fence, exc_type = 'Expired', message = message,
    error = error_body(message, 'timeout_error', 'expired')})
end

local function terminate_malformed(id, message)
  terminate(id, {type = 'failed', exc_type = 'InvalidRequest', message = message,
    error = error_body(message, 'invalid_request_error', 'invalid_request')})
end

-- `tag` must not be that of another open job; '' for a job that ends at once.
local function create_record(id, tag, level, client, tokens)
  if tag ~= '' then
    redis.call('HSET', K.deliveries, tag, 0)
  end
  redis.call('HSET', K.job .. id, 'status', 'queued', 'tag', tag, 'level', level, 'created_ms', ms(NOW), 'seq', 0,
    'client', client, 'tokens', tokens)
  redis.call('ZADD', K.jobs, NOW, id)
  if client ~= '' then
    redis.call('ZADD', K.jobs_of_all .. client, NOW, id)
  end
  count('accepted')
  move(id, nil, 'queued', NOW)
end

local function is_job_id(id)
  return type(id) == 'string' and #id >= 1 and #id <= 128 and not string.find(id, '[^%w_.:%-]')
end

local function is_cancel_wished(id, record)
  return record.cancel or redis.call('EXISTS', K.cancel .. id) == 1
end

-- The job is nobody's; the caller puts it where it waits.
local function give_up_lease(id, tag, fence)
  drop_lease(tag, fence)
  redis.call('HDEL', K.job .. id, 'fence')
  charge(id, 0)
end

-- Take a lease back as if it had never been given: the job goes first again.
local function undo_lease(id, tag, value)
  local head, raw = read_unacked(value)
  redis.call('HSET', K.job .. id, 'attempts', redis.call('HINCRBY', K.deliveries, tag, -1))
  if is_cancel_wished(id, record_of(id, 'cancel')) then
    terminate_cancelled(id)
    return
  end
  give_up_lease(id, tag, head[2])
  count('handed_back')
  if head[1] == K.suspect then
    join_suspects(id, raw, true)
  else
    join_line(id, raw, true)
  end
end
