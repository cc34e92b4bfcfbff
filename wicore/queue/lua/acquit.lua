-- A suspect went well past the point at which its last worker died: this one may try the next.
-- keys: trial:{owner}
-- args: owner, tag
-- returns: nothing of use
-- safe: a repeat, or one that comes after the lease has gone, finds another trial or none.
local owner, tag = ARGV[1], ARGV[2]
if redis.call('GET', K.trial .. owner) == tag then
  redis.call('DEL', K.trial .. owner)
end
return 1
