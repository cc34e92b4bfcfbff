-- A page of dead letters, newest first, their messages cut.
-- keys: dead
-- args: how many at most, '' or the id after which to go on (which may have gone), bytes of each message
-- returns: for each {the entry without its message, JSON; the message's beginning, still as JSON text without
--       its quotes, perhaps cut inside a character or an escape; its whole length as such a text}
-- safe: writes nothing.
local wanted, after, most = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local first = after == '' and 0 or dead_below(tonumber(string.match(after, '(%d+)$')))
local page = {}
for i = first, first + wanted - 1 do
  local entry = redis.call('LINDEX', K.dead, i)
  if not entry then
    break
  end
  local cut = string.find(entry, DEAD_MESSAGE, 1, true)
  local start, stop = cut + #DEAD_MESSAGE + 1, #entry - 2
  page[#page + 1] = {string.sub(entry, 1, cut - 1) .. '}',
    string.sub(entry, start, math.min(stop, start + most - 1)), stop - start + 1}
end
return page
