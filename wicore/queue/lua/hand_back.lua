-- Put leased messages back at the head of the lists they came from; the attempt does not count.
-- One that someone wants off ends here instead.
-- keys: unacked, leases, deliveries, cancel:{id}, job:{id}, jobs:*, deadlines, the list
-- args: id, tag, fence, id, tag, fence, ...
-- returns: how many went back
-- safe: fenced; a repeat finds no fence and does nothing.
local count = 0
-- Backwards, so that the first taken ends up foremost.
for i = #ARGV - 2, 1, -3 do
  local id, tag, fence = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local value = redis.call('HGET', K.job .. id, 'fence') == fence and redis.call('HGET', K.unacked, tag)
  if value then
    undo_lease(id, tag, value)
    count = count + 1
  end
end
return count
