-- Complete the record of a message that another client pushed, once its body has been read.
-- keys: job:{id}; for a job that is late, those of terminate (common.lua)
-- args: id, fence, deadline ms or '', then field, value, ... of the record
-- returns: 1, run it | 0, it has ended as expired or the lease was lost
-- safe: fenced; writing the same fields again changes nothing.
local id, fence, deadline = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', K.job .. id, 'fence') ~= fence then
  return 0
end
if #ARGV > 3 then
  redis.call('HSET', K.job .. id, unpack(ARGV, 4))
end
if deadline ~= '' then
  redis.call('HSET', K.job .. id, 'deadline_ms', deadline)
  if tonumber(deadline) <= NOW then
    terminate_expired(id, fence)
    return 0
  end
end
return 1
