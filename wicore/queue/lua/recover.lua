-- Hand back what is leased to an owner without its knowing: the answer to a pop was lost.
-- keys: as hand_back.lua
-- args: owner, then the tags it knows of
-- returns: how many went back
-- safe: only the owner calls it, between its pops; a repeat finds nothing left. Reads all of `unacked`,
--       which is fine for something this rare.
local prefix, known, count = ARGV[1] .. ':', {}, 0
for i = 2, #ARGV do
  known[ARGV[i]] = true
end
local all = redis.call('HGETALL', K.unacked)
for i = 1, #all, 2 do
  local tag = all[i]
  local head = read_unacked(all[i + 1])
  if not known[tag] and string.sub(head[2], 1, #prefix) == prefix then
    undo_lease(head[3], tag, all[i + 1])
    count = count + 1
  end
end
return count
