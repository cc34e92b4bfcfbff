-- Look at the jobs that come next without taking them, in about the order in which pop.lua would.
-- Not looked at: suspects, messages that no pop has sorted yet, and the share of pops that starts at the bottom.
-- keys: job:{id}, message:{id}, cancel:{id}, clients:{level}, queue:{level}:{client}
-- args: how many at most
-- returns: for each {id, raw, level}
-- safe: writes nothing, and the server refuses it if it would (scripts.py). What must not run any more is
--       skipped and left for a pop to end.
local wanted = tonumber(ARGV[1])
-- All bound the time others wait.
local CLIENTS = 100 -- of a level
local IDS = 200
local BYTES = 2 ^ 20 -- of messages, the last one apart
local found, seen, bytes = {}, 0, 0

-- The clients of a level that are next, each with its turn and how many of its jobs were looked at.
local function line_up(level)
  local turns, clients = redis.call('ZRANGE', K.clients .. level, 0, CLIENTS - 1, 'WITHSCORES'), {}
  for i = 1, #turns, 2 do
    clients[#clients + 1] = {name = turns[i], turn = tonumber(turns[i + 1]), list = queue_of(level, turns[i]), seen = 0}
  end
  return clients
end

-- Where the client whose turn it is stands; equal turns go by name, as a sorted set has them.
local function next_of(clients)
  local best = 1
  for i = 2, #clients do
    local one, other = clients[best], clients[i]
    if other.turn < one.turn or other.turn == one.turn and other.name < one.name then
      best = i
    end
  end
  return best
end

-- The client's turn passes as if the job were leased.
local function look_at(id, client, level)
  local record = record_of(id, 'at', 'tokens', 'cancel')
  if record.at ~= client.list or is_cancel_wished(id, record) or is_late(id) then
    return
  end
  local raw = redis.call('GET', K.message .. id)
  if raw then
    client.turn = client.turn + tonumber(record.tokens)
    bytes = bytes + #raw
    found[#found + 1] = {id, raw, tonumber(level)}
  end
end

local function is_enough()
  return #found >= wanted or seen >= IDS or bytes >= BYTES
end

for _, level in ipairs(K.levels) do
  local clients = line_up(level)
  while #clients > 0 and not is_enough() do
    local place = next_of(clients)
    local client = clients[place]
    local id = redis.call('LINDEX', client.list, -1 - client.seen)
    if id then
      client.seen, seen = client.seen + 1, seen + 1
      look_at(id, client, level)
    else
      table.remove(clients, place)
    end
  end
end
return found
