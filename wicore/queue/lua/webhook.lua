-- Claim the delivery of a webhook that is due.
-- keys: webhooks, job:{id}
-- args: id, ms for which the claim keeps others off
-- returns: {attempt, field, value, ... of the record} | false, nothing is due
-- safe: one caller gets it; when that one dies the entry is due again after the claim, so that an answer that
--       was lost means one more delivery, never none.
local id, claim_ms = ARGV[1], tonumber(ARGV[2])
local due = redis.call('ZSCORE', K.webhooks, id)
if not due or tonumber(due) > NOW then
  return false
end
if redis.call('EXISTS', K.job .. id) == 0 then
  redis.call('ZREM', K.webhooks, id)
  return false
end
redis.call('ZADD', K.webhooks, NOW + claim_ms, id)
local attempt = redis.call('HINCRBY', K.job .. id, 'webhook_attempts', 1)
return {attempt, unpack(redis.call('HGETALL', K.job .. id))}
