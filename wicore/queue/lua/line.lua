-- The line: where jobs wait, who is next, and how long that takes. Put before every script, after base.lua.
-- A job waits as its id, in the queue of its client and level or in `suspect`; its message is in message:{id}.
--
-- Within a level clients take turns by tokens: start-time fair queueing (Goyal, Vin and Cheng, 1996), each
-- job charged what it is expected to take when it is leased, and what it took when it ends, as the virtual
-- token counter is (Sheng et al., OSDI 2024). A client's score in `clients` is its turn: the lowest is next, and
-- who comes back from a pause starts where the line is now.

local OUTPUT_GUESS = 256 -- tokens, until jobs have ended
local CLIENTS_SEEN = 1000 -- how many an estimate looks at
local MEMORY = 0.98 -- what each job's end leaves of the averages before it: about the last 50 jobs

local function queue_of(level, client)
  return K.queue .. level .. ':' .. client
end

local function count_waiting(level, client, jobs, tokens)
  local waiting, backlog = K.waiting, K.backlog .. level
  redis.call('HINCRBY', waiting, level .. ':jobs', jobs)
  redis.call('HINCRBY', waiting, level .. ':tokens', tokens)
  if redis.call('HINCRBY', backlog, client .. ':jobs', jobs) == 0 then
    redis.call('HDEL', backlog, client .. ':jobs', client .. ':tokens')
  else
    redis.call('HINCRBY', backlog, client .. ':tokens', tokens)
  end
end

-- Wake the workers that wait for a push on the level: its list never stays empty while there is work.
local function ring(level)
  local list = K.lists[level]
  if redis.call('EXISTS', list) == 0 then
    redis.call('LPUSH', list, C.bell)
  end
end

local function set_waiting(id, list)
  local record = record_of(id, 'status', 'created_ms', 'deadline_ms', 'start_by_ms', 'started_ms')
  redis.call('HSET', K.job .. id, 'status', 'queued', 'at', list)
  if record.status ~= 'queued' then
    move(id, record.status, 'queued', record.created_ms)
  end
  local limit = due(record)
  if limit < math.huge then
    redis.call('ZADD', K.deadlines, limit, id)
  end
end

-- Put a job that nobody has into its client's queue, at the head or at the tail.
local function join_line(id, raw, at_head)
  local record = record_of(id, 'level', 'client', 'tokens')
  local level, client = record.level, record.client
  local list, clients = queue_of(level, client), K.clients .. level
  local turn = tonumber(redis.call('HGET', K.turns, level) or '0')
  local own = tonumber(redis.call('ZSCORE', clients, client) or '0')
  redis.call('SET', K.message .. id, raw)
  redis.call(at_head and 'RPUSH' or 'LPUSH', list, id)
  redis.call('ZADD', clients, math.max(turn, own), client)
  count_waiting(level, client, 1, record.tokens)
  set_waiting(id, list)
  ring(level)
end

local function join_suspects(id, raw, at_head)
  redis.call('SET', K.message .. id, raw)
  redis.call(at_head and 'RPUSH' or 'LPUSH', K.suspect, id)
  set_waiting(id, K.suspect)
end

-- A waiting job is taken or ends. If it ends its id stays in its queue, where it means nothing any more.
local function leave_line(id)
  local record = record_of(id, 'at', 'level', 'client', 'tokens')
  if record.at and record.at ~= K.suspect then
    count_waiting(record.level, record.client, -1, -record.tokens)
  end
  redis.call('HDEL', K.job .. id, 'at')
  redis.call('ZREM', K.deadlines, id)
end

-- The client whose turn it is, nil when nobody waits. Who has nothing waiting loses his place.
local function next_client(level)
  while true do
    local client = redis.call('ZRANGE', K.clients .. level, 0, 0)[1]
    if not client or redis.call('EXISTS', queue_of(level, client)) == 1 then
      return client
    end
    redis.call('ZREM', K.clients .. level, client)
  end
end

local function charge(id, tokens)
  local record = record_of(id, 'level', 'client', 'charged')
  local clients = K.clients .. record.level
  local before = redis.call('ZSCORE', clients, record.client)
  if before then
    redis.call('ZADD', clients, tonumber(before) + tokens - tonumber(record.charged or '0'), record.client)
  end
  redis.call('HSET', K.job .. id, 'charged', tokens)
end

-- Decayed sums over the jobs that ended: their number, ms from lease to end, expected and output tokens.
local function pace_sums()
  local sums = redis.call('HMGET', K.pace, 'jobs', 'ms', 'tokens', 'output')
  for i = 1, 4 do
    sums[i] = tonumber(sums[i] or '0')
  end
  return sums
end

-- Their means; nil before any.
local function pace()
  local sums = pace_sums()
  local jobs = sums[1]
  if jobs == 0 then
    return nil
  end
  return {ms = sums[2] / jobs, tokens = sums[3] / jobs, output = sums[4] / jobs}
end

-- What an ended job really took: settles its client's turn, and teaches the pace.
local function settle(id, ending, usage)
  if usage then
    charge(id, usage.total_tokens)
  end
  if ending ~= 'done' or not usage then
    return
  end
  local record = record_of(id, 'leased_ms', 'tokens')
  local seen = {1, NOW - record.leased_ms, record.tokens, usage.completion_tokens}
  local sums = pace_sums()
  for i = 1, 4 do
    sums[i] = string.format('%.6f', sums[i] * MEMORY + seen[i])
  end
  redis.call('HSET', K.pace, 'jobs', sums[1], 'ms', sums[2], 'tokens', sums[3], 'output', sums[4])
end

local function expected_tokens(prompt, most_output)
  local known = pace()
  return math.ceil(prompt + math.min(most_output, known and known.output or OUTPUT_GUESS))
end

-- A message that nobody has looked at yet: its length says something about its prompt.
local function guessed_tokens(raw)
  return expected_tokens(#raw / 4, math.huge)
end

-- Messages that came from other clients and were not looked at yet.
local function unseen(level)
  local list = K.lists[level]
  local length = redis.call('LLEN', list)
  if length > 0 and redis.call('LINDEX', list, -1) == C.bell then
    length = length - 1
  end
  return length
end

local function waiting(level)
  local counts = redis.call('HMGET', K.waiting, level .. ':jobs', level .. ':tokens')
  return tonumber(counts[1] or '0') + unseen(level), tonumber(counts[2] or '0')
end

-- Jobs and tokens served before a new job of this client, if nobody else comes.
local function ahead_of(level, client)
  local jobs, tokens = redis.call('LLEN', K.suspect), 0
  for _, other in ipairs(K.levels) do
    if tonumber(other) < tonumber(level) then
      local more_jobs, more_tokens = waiting(other)
      jobs, tokens = jobs + more_jobs, tokens + more_tokens
    end
  end
  local turn = tonumber(redis.call('HGET', K.turns, level) or '0')
  local own = redis.call('HMGET', K.backlog .. level, client .. ':jobs', client .. ':tokens')
  local start = math.max(turn, tonumber(redis.call('ZSCORE', K.clients .. level, client) or '0'))
    + tonumber(own[2] or '0')
  jobs, tokens = jobs + unseen(level) + tonumber(own[1] or '0'), tokens + tonumber(own[2] or '0')
  local others = redis.call('ZRANGE', K.clients .. level, 0, CLIENTS_SEEN - 1, 'WITHSCORES')
  for i = 1, #others, 2 do
    local counts = redis.call('HMGET', K.backlog .. level, others[i] .. ':jobs', others[i] .. ':tokens')
    if others[i] ~= client and counts[1] then
      -- The job that is under way when our start is reached is served whole.
      local mean = counts[2] / counts[1]
      local sooner = math.min(tonumber(counts[1]), math.max(0, math.ceil((start - others[i + 1]) / mean)))
      jobs, tokens = jobs + sooner, tokens + sooner * mean
    end
  end
  return jobs, tokens
end

-- Slots of the workers that are alive, as registry.py tells them apart; looked up once a second at most.
local function capacity()
  local known = redis.call('GET', K.capacity)
  if known then
    return tonumber(known)
  end
  local slots = 0
  for _, text in ipairs(redis.call('HVALS', K.workers)) do
    local worker = cjson.decode(text)
    if NOW - worker.at_ms < C.alive_periods * worker.period_s * 1000 then
      slots = slots + (worker.slots or 0)
    end
  end
  redis.call('SET', K.capacity, slots, 'PX', 1000)
  return slots
end

-- Milliseconds until a slot frees for what comes after so many jobs and tokens; nil when nothing tells.
-- By Little's law: as many jobs end a second as run at once, over the time that one takes.
local function wait_after(jobs, tokens)
  local running, slots, known = redis.call('ZCARD', K.leases), capacity(), pace()
  if slots == 0 then
    return nil
  end
  if running + jobs < slots then
    return 0
  end
  if not known or known.tokens == 0 then
    return nil
  end
  return (tokens + known.tokens) * known.ms / known.tokens / math.max(1, running)
end
