-- Append events of one job to its log and channel.
-- keys: job:{id}, log:{id}, jobs:queued, jobs:running; channel events:{id}
-- args: id, fence, seq of the first event, 1 when a `started` or `resumed` is among them, 1 when a token is,
--       then the events, JSON text, consecutive
-- returns: 0, lease lost, nothing written | 1, written | 2, written, and someone wants the job off |
--       -k, nothing written: it would leave a gap, the log needs event k next
-- safe: fenced; events up to the log's last seq are there already (a repeat) and are passed over.
local id, fence, first = ARGV[1], ARGV[2], tonumber(ARGV[3])
local record = record_of(id, 'fence', 'seq', 'status', 'created_ms', 'started_ms', 'first_token_ms', 'cancel')
if record.fence ~= fence then
  return 0
end
local last = tonumber(record.seq or '0')
if first > last + 1 then
  return -(last + 1)
end
for i = 6, #ARGV do
  local seq = first + i - 6
  if seq > last then
    publish(id, seq, ARGV[i])
    last = seq
  end
end
redis.call('HSET', K.job .. id, 'seq', last)
if ARGV[4] == '1' and record.status ~= 'running' then
  redis.call('HSET', K.job .. id, 'status', 'running')
  move(id, record.status, 'running', record.created_ms)
end
if ARGV[4] == '1' and not record.started_ms then
  redis.call('HSET', K.job .. id, 'started_ms', ms(NOW))
end
if ARGV[5] == '1' and not record.first_token_ms then
  redis.call('HSET', K.job .. id, 'first_token_ms', ms(NOW))
end
return is_cancel_wished(id, record) and 2 or 1
