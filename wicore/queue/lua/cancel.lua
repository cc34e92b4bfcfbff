-- Call a job off.
-- keys: cancel:{id}, job:{id}; channel control; for a waiting job, those of terminate (common.lua)
-- args: id
-- returns: the status after the call, '' when there is no record
-- safe: idempotent. A waiting job ends here and pop drops its message; of a leased one only the wish is
--       written, in its record too, so that it outlives the key: the worker ends it, or reap or the next pop.
local id = ARGV[1]
local record = record_of(id, 'status', 'at')
if TERMINAL[record.status] then
  return record.status
end
if record.at then
  terminate_cancelled(id)
  return 'cancelled'
end
redis.call('SET', K.cancel .. id, '1', 'EX', 3600)
if record.status then
  redis.call('HSET', K.job .. id, 'cancel', '1')
end
redis.call('PUBLISH', K.control, '{"type":"cancel","job":' .. cjson.encode(id) .. '}')
return record.status or ''
