-- Delete what is kept of a response: with its job if that has ended, and owes no webhook nor a batch its answer.
-- keys: job:{id}, log:{id}, celery-task-meta-{id} and those of unlist (common.lua)
-- args: id
-- returns: 1, it was there | 0, there is no response
-- safe: idempotent. An open job lives on to its end as any other; only what made it a response is gone.
local id = ARGV[1]
local record = record_of(id, 'status', 'webhook_status', 'batch', 'client')
if redis.call('HDEL', K.job .. id, 'response') == 0 then
  return 0
end
if TERMINAL[record.status] and record.webhook_status ~= 'pending' and not record.batch then
  redis.call('DEL', K.job .. id, K.log .. id, K.celery_result .. id)
  unlist(id, record.client)
end
return 1
