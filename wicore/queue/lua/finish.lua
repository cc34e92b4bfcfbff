-- End a leased job: ack, record, Celery result and terminal event in one step.
-- keys: job:{id}, dead, and those of terminate (common.lua)
-- args: id, fence, type, seq and event JSON (both '' to have one made), result JSON, usage JSON, error JSON,
--       finish_reason, exc_type, message, reason to bury the message; '' where there is none
-- returns: 1, ended (also on a repeat by who ended it) | 0, the lease was lost, nothing written |
--       -k, nothing written: the log needs event k next
-- safe: fenced; the fence goes with the end, so a job cannot end twice.
local id, fence, seq = ARGV[1], ARGV[2], ARGV[4]
local function arg(i)
  return ARGV[i] ~= '' and ARGV[i] or nil
end
local record = record_of(id, 'fence', 'seq', 'tag', 'level', 'client', 'finished_by')
if record.fence ~= fence then
  return record.finished_by == fence and 1 or 0
end
local nextseq = tonumber(record.seq or '0') + 1
if seq ~= '' and tonumber(seq) ~= nextseq then
  return -nextseq
end
if arg(12) then
  local _, raw = read_unacked(redis.call('HGET', K.unacked, record.tag))
  bury(raw, arg(12), id, record.level, record.client)
end
terminate(id, {type = ARGV[3], event = arg(5), result = arg(6), usage = arg(7), error = arg(8),
  finish_reason = arg(9), exc_type = arg(10), message = arg(11), fence = fence})
return 1
