-- A line of a batch has become a job, or has its answer.
-- keys: batch:{id} and its lines, open, ended; file:{file}:{n}; job:{id} and those of start_retention
-- args: batch, number of the line, id of its job, custom_id; then, unless it has just become a job: output | error,
--       the answer to be put out there, with its newline, what counts it (completed | failed | expired), input tokens,
--       output tokens
-- returns: 1, done | 0, nothing done: the line has its answer already, or is not the next
-- safe: lines are taken from the head of the list, each once, and answered once, in whatever order runners call
--       this and however often. An answer lets the record of the line's job go, which its end did not.
local batch, line, job, custom_id, which, text, outcome = unpack(ARGV, 1, 7)
local key = K.batch .. batch
local PIECE = 1048576

local function put_out()
  local file, pieces = redis.call('HGET', key, which .. '_file'), tonumber(redis.call('HGET', key, which .. '_pieces'))
  if pieces == 0 or redis.call('STRLEN', K.file .. file .. ':' .. (pieces - 1)) >= PIECE then
    pieces = redis.call('HINCRBY', key, which .. '_pieces', 1)
  end
  redis.call('APPEND', K.file .. file .. ':' .. (pieces - 1), text)
  redis.call('HINCRBY', key, which .. '_bytes', #text)
  redis.call('HINCRBY', key, outcome, 1)
  redis.call('HINCRBY', key, 'input_tokens', ARGV[8])
  redis.call('HINCRBY', key, 'output_tokens', ARGV[9])
end

local function let_go()
  redis.call('LREM', key .. ':ended', 1, job)
  if redis.call('HDEL', K.job .. job, 'batch') == 1 then
    start_retention(job)
  end
end

local status = redis.call('HGET', K.job .. job, 'status')
local is_next = redis.call('HGET', key, 'next') == line
local becomes_job = status and not (which and TERMINAL[status])
if is_next and (becomes_job or which) then
  redis.call('LPOP', key .. ':lines')
  redis.call('HINCRBY', key, 'next', 1)
  if becomes_job then
    redis.call('HSET', key .. ':open', line, custom_id)
    return 1
  end
elseif not which then
  return 0
elseif redis.call('HDEL', key .. ':open', line) == 0 then
  let_go()
  return 0
end
put_out()
let_go()
return 1
