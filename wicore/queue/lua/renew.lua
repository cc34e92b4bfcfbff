-- Extend the leases that are still held.
-- keys: leases, job:{id}, cancel:{id}
-- args: id, tag, fence, id, tag, fence, ...
-- returns: {tags lost, tags whose job someone wants off}
-- safe: a lease that expired and was not reaped yet is still held: the fence decides, not the time.
local lost, cancelled = {}, {}
for i = 1, #ARGV, 3 do
  local id, tag, fence = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local record = record_of(id, 'fence', 'cancel')
  if record.fence == fence then
    redis.call('ZADD', K.leases, 'XX', NOW + C.lease_ms, tag)
    if is_cancel_wished(id, record) then
      cancelled[#cancelled + 1] = tag
    end
  else
    lost[#lost + 1] = tag
  end
end
return {lost, cancelled}
