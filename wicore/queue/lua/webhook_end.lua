-- Say how an attempt to deliver a webhook ended.
-- keys: webhooks, job:{id}
-- args: id, attempt, delivered | failed | retry, reason or '', ms until the next attempt
-- returns: the webhook's status: delivered | failed | pending; '' when this attempt has no say any more
-- safe: a later attempt, or the end of the webhook, silences an earlier one; so does a repeat. What would be
--       tried again after the record has gone is given up.
local id, attempt, outcome, reason, wait_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local record = record_of(id, 'webhook_attempts', 'finished_ms')
if record.webhook_attempts ~= attempt or not redis.call('ZSCORE', K.webhooks, id) then
  return ''
end
local status = outcome == 'retry' and 'pending' or outcome
if status == 'pending' and NOW + wait_ms >= tonumber(record.finished_ms) + C.retention_s * 1000 then
  status = 'failed'
  reason = reason .. '; the next attempt would come after queue.retention_s'
end
redis.call('HSET', K.job .. id, 'webhook_status', status, 'webhook_error', reason)
if status == 'pending' then
  redis.call('ZADD', K.webhooks, NOW + wait_ms, id)
else
  redis.call('ZREM', K.webhooks, id)
end
return status
