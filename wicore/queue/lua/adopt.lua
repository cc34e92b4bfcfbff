-- Complete the record of a message that another client pushed, once its body has been read.
-- keys: job:{id}; for a job that is late, those of terminate (common.lua)
-- args: id, fence, deadline ms or '', start-by ms or '', then field, value, ... of the record
-- returns: 1, run it | 0, it has ended as expired or the lease was lost
-- safe: fenced; writing the same fields again changes nothing.
local id, fence, deadline, start_by = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', K.job .. id, 'fence') ~= fence then
  return 0
end
redis.call('HDEL', K.job .. id, 'unread')
if #ARGV > 4 then
  redis.call('HSET', K.job .. id, unpack(ARGV, 5))
end
if deadline ~= '' then
  redis.call('HSET', K.job .. id, 'deadline_ms', deadline)
end
if start_by ~= '' then
  redis.call('HSET', K.job .. id, 'start_by_ms', start_by)
end
if is_late(id) then
  terminate_expired(id, fence)
  return 0
end
return 1
