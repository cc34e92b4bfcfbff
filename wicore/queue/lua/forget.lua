-- Delete what is kept of a response: with its job if that has ended, and owes no webhook.
-- keys: job:{id}, log:{id}, celery-task-meta-{id}, jobs, jobs:{status}, finished
-- args: id
-- returns: 1, it was there | 0, there is no response
-- safe: idempotent. An open job lives on to its end as any other; only what made it a response is gone.
local id = ARGV[1]
local record = record_of(id, 'status', 'webhook_status')
if redis.call('HDEL', K.job .. id, 'response') == 0 then
  return 0
end
if TERMINAL[record.status] and record.webhook_status ~= 'pending' then
  redis.call('DEL', K.job .. id, K.log .. id, K.celery_result .. id)
  redis.call('ZREM', K.jobs, id)
  redis.call('ZREM', K.jobs_by_status[record.status], id)
  redis.call('ZREM', K.finished, id)
end
return 1
